"""Bytes and arithmetic of the real code: the loop, the scorer and the decoder that will run.

Over fake tensors that is a prediction, over real ones a measurement; it is the same accounting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loracle.config.run import Config
from loracle.data import Example
from loracle.data.records import Record
from loracle.engine.decode import Answering
from loracle.engine.evaluate import score_examples
from loracle.engine.train import train_bundle
from loracle.engine.train_state import TrainState, new_run
from loracle.forecast.op_costs import Work
from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.model.live_bytes import LiveBytes, Part


@dataclass(frozen=True)
class Trace:
    """What a stretch of code takes."""

    peak: int
    """Most bytes that were live at once."""
    parts: Mapping[Part, int]
    """The peak by what it is for."""
    rest: int
    """Bytes that stay afterwards."""
    work: Work
    """What was computed."""


@dataclass(frozen=True)
class AnswersTrace:
    """What decoding a batch takes."""

    first: Trace
    """All prompts in, one token out."""
    last: Trace
    """One more token of each, when the cache is full."""


def made_up_examples(lengths: Sequence[tuple[int, int]]) -> list[Example]:
    """Returns examples of these many prompt and response tokens; every token is the same."""
    record = Record(row=0, instruction="planned", input="", output="planned")
    return [
        Example(
            record=record, input_ids=(1,) * (prompt + response), num_prompt=prompt, truncated=False
        )
        for prompt, response in lengths
    ]


def trace_step(
    base: FrozenBase,
    *,
    adapter: Adapter,
    config: Config,
    examples: Sequence[Example],
    granule: int = 1,
    counts_work: bool = True,
) -> Trace:
    """Returns what an optimizer step takes of a run alone, any but its first.

    Args:
        base: The base, real or pretended.
        adapter: What trains.
        config: The run's configuration.
        examples: One batch.
        granule: As of `LiveBytes`.
        counts_work: False: memory alone, which is faster.
    """
    train = config.train.model_copy(update={"max_steps": 1, "batch_size": len(examples)})
    trained = list(adapter.parameters.values())
    run = new_run(
        base,
        adapter=adapter,
        examples=list(examples),
        train=train,
        dropout=config.lora.dropout,
        seed=config.seed,
    )
    moments = _make_moments(run)
    live, work = _begin(base, adapter, granule=granule)
    if not counts_work:
        live.watch = None
    live.hold(moments, "optimizer")
    hooks = live.hold_gradients(trained)
    with live:
        steps = train_bundle(
            base,
            [run],
            micro_batch_tokens=train.micro_batch_tokens,
            checkpointing=train.gradient_checkpointing,
        )
        for _ in steps:
            pass
    for hook in hooks:
        hook.remove()
    return _trace(live, work)


def _make_moments(run: TrainState) -> list[torch.Tensor]:
    """Gives the optimizer the state that it has after a step, and returns its tensors."""
    for parameter in run.adapter.parameters.values():
        run.optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return [moment for state in run.optimizer.state.values() for moment in state.values()]


def trace_scoring(
    base: FrozenBase,
    *,
    adapter: Adapter,
    examples: Sequence[Example],
    granule: int = 1,
) -> Trace:
    """Returns what scoring these examples takes, in one pass."""
    live, work = _begin(base, adapter, granule=granule)
    with live:
        score_examples(
            base,
            examples,
            adapter=None if adapter.plan.is_full else adapter.name,
            batch_tokens=sum(example.num_tokens for example in examples),
        )
    return _trace(live, work)


def trace_answers(
    base: FrozenBase,
    *,
    adapter: Adapter,
    num_prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    granule: int = 1,
) -> AnswersTrace:
    """Returns what decoding takes at its beginning and at its end.

    Args:
        base: The base, real or pretended.
        adapter: Whose answers they are.
        num_prompts: Prompts decoded together.
        prompt_tokens: Of each.
        new_tokens: Of each answer.
        granule: As of `LiveBytes`.
    """
    live, first = _begin(base, adapter, granule=granule)
    name = None if adapter.plan.is_full else adapter.name
    answering = Answering(base, [(1,) * prompt_tokens] * num_prompts, adapters=[name])
    last = Work()
    with base.generating(()), live:
        answering.forward()
        beginning = _trace(live, first)
        live.watch = None
        answering.pretend_position(prompt_tokens + new_tokens - 1)
        live.forget_peak()
        live.watch = last.add
        answering.forward()
    return AnswersTrace(beginning, _trace(live, last))


def _begin(base: FrozenBase, adapter: Adapter, *, granule: int) -> tuple[LiveBytes, Work]:
    work = Work()
    live = LiveBytes(granule=granule, watch=work.add)
    live.hold(base.held_tensors(), "weights")
    live.hold(adapter.parameters.values(), "weights" if adapter.plan.is_full else "adapters")
    live.forget_peak()
    return live, work


def _trace(live: LiveBytes, work: Work) -> Trace:
    return Trace(live.peak_bytes, dict(live.parts_at_peak), live.live_bytes, work)
