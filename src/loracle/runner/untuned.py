"""What the untuned base scores and answers: asked for once on a base, and known from then on."""

from __future__ import annotations

from loracle.engine.evaluate import Answer, ExampleScore, answer_prompts, score_examples
from loracle.engine.measure import MemoryMeter
from loracle.runner.shared_base import Workbench
from loracle.runner.untuned_cache import answer_key, score_key


def untuned_scores(bench: Workbench, *, memory: MemoryMeter) -> tuple[list[ExampleScore], bool]:
    """Returns the untuned base's scores, and whether they were known from an earlier time."""
    if bench.untuned_scores is None:
        batch_tokens = bench.config.eval.batch_tokens

        def compute() -> list[ExampleScore]:
            title, total = "validate the untuned base", len(bench.scored)
            with bench.screen.phase(title, total=total) as advance, memory.phase("evaluate"):
                return score_examples(
                    bench.base,
                    bench.scored,
                    adapter=None,
                    batch_tokens=batch_tokens,
                    progress=bench.stopping(advance),
                )

        key = score_key(
            bench.base,
            bench.scored,
            weights_digest=bench.weights_digest,
            adapter=None,
            batch_tokens=batch_tokens,
        )
        bench.untuned_scores = bench.known.scores(key, compute)
    return bench.untuned_scores


def untuned_answers(bench: Workbench, *, memory: MemoryMeter) -> tuple[list[Answer], bool]:
    """Returns the untuned base's greedy answers, and whether they were known before."""
    if bench.untuned_answers is None:
        settings = {
            "max_new_tokens": bench.config.eval.max_new_tokens,
            "batch_size": bench.config.eval.generate_batch_size,
        }

        def compute() -> list[Answer]:
            title, total = "answer (base)", len(bench.prompts)
            with bench.screen.phase(title, total=total) as advance, memory.phase("generate"):
                return answer_prompts(
                    bench.base,
                    bench.prompts,
                    adapter=None,
                    progress=bench.stopping(advance),
                    **settings,
                )

        key = answer_key(
            bench.base,
            bench.prompts,
            weights_digest=bench.weights_digest,
            adapter=None,
            **settings,
        )
        bench.untuned_answers = bench.known.answers(key, compute)
    return bench.untuned_answers


def know_untuned(bench: Workbench) -> None:
    """Scores the untuned base and has it answer, while there is one."""
    memory = bench.meter()
    untuned_scores(bench, memory=memory)
    if bench.prompts:
        untuned_answers(bench, memory=memory)
