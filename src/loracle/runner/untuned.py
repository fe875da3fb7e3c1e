"""Scores and answers of the untuned base: from the cache or computed, once per base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from loracle.engine.answers import Answer, answer_prompts
from loracle.engine.evaluate import ExampleScore, score_examples
from loracle.engine.measure import MemoryMeter
from loracle.runner.shared_base import SharedBase
from loracle.runner.untuned_cache import Untuned, answer_key, score_key

T = TypeVar("T")


def untuned_scores(shared: SharedBase, *, memory: MemoryMeter) -> Untuned[ExampleScore]:
    """Returns the untuned base's scores of the validation examples."""
    if shared.untuned_scores is None:
        examples = shared.scored
        settings = {"batch_tokens": shared.config.eval.batch_tokens}

        def compute() -> list[ExampleScore]:
            with memory.phase("evaluate"):
                return _show(
                    "validate the untuned base", shared, score_examples, examples, settings
                )

        key = score_key(shared.identity, examples, environment=shared.environment, **settings)
        shared.untuned_scores = shared.cache.scores(key, compute)
    return shared.untuned_scores


def untuned_answers(shared: SharedBase, *, memory: MemoryMeter) -> Untuned[Answer]:
    """Returns the untuned base's greedy answers to the validation prompts."""
    if shared.untuned_answers is None:
        prompts, limits = shared.prompts, shared.config.eval
        settings = {
            "max_new_tokens": limits.max_new_tokens,
            "batch_size": limits.generate_batch_size,
        }

        def compute() -> list[Answer]:
            with memory.phase("generate"):
                return _show("answer (base)", shared, answer_prompts, prompts, settings)

        key = answer_key(shared.identity, prompts, environment=shared.environment, **settings)
        shared.untuned_answers = shared.cache.answers(key, compute)
    return shared.untuned_answers


def _show(
    title: str,
    shared: SharedBase,
    function: Callable[..., list[T]],
    inputs: Sequence[Any],
    settings: dict[str, int],
) -> list[T]:
    """Returns what ``function`` computes of the inputs on the untuned base, under a bar."""
    with shared.progress.phase(title, total=len(inputs)) as advance:
        progress = shared.stopping(advance)
        return function(shared.base, inputs, adapter=None, progress=progress, **settings)


def ensure_untuned(shared: SharedBase) -> None:
    """Scores the untuned base and has it answer, while there is one."""
    memory = shared.meter()
    untuned_scores(shared, memory=memory)
    if shared.prompts:
        untuned_answers(shared, memory=memory)
