"""Evaluation of a bundle: validations and answers, each left in the runs' folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loracle.engine.answers import answer_with_adapters
from loracle.engine.evaluate import ExampleScore, likelihood, score_adapters
from loracle.errors import NonFiniteError
from loracle.records.names import ANSWERS
from loracle.records.run_folder import RunFolder
from loracle.runner.active_run import ActiveRun, isolate_failure, open_only
from loracle.runner.bundle_size import bundle_budget
from loracle.runner.untuned import untuned_answers, untuned_scores
from loracle.text import perplexity_words


def validate_due(runs: Sequence[ActiveRun]) -> None:
    """Scores the validation set for the runs that are due and have not recorded it yet."""
    due = [run for run in open_only(runs) if _is_due(run)]
    for run in due:
        if run.state.step == 0:
            with isolate_failure(run):
                untuned = untuned_scores(run.shared, memory=run.memory)
                run.note(untuned_scores=untuned.origin)
                _record_scores(run, untuned.items, model="base")
    tuned = [run for run in due if run.state.step > 0]
    for run, scores in zip(tuned, _tuned_scores(tuned), strict=True):
        if scores is not None:
            with isolate_failure(run):
                _record_scores(run, scores, model="tuned")


def _is_due(run: ActiveRun) -> bool:
    step = run.state.step
    if not run.config.validates_at(step):
        return False
    return recorded_eval(run.folder, step=step, model="tuned" if step else "base") is None


def _tuned_scores(runs: Sequence[ActiveRun]) -> list[list[ExampleScore] | None]:
    """Returns the scores of each run, in one pass for all; None for a run that failed here."""
    if not runs:
        return []
    try:
        return list(_scores_together(runs))
    except NonFiniteError as error:
        if len(runs) == 1:
            runs[0].fail(error)
            return [None]
    # One of them is broken; scoring them one by one shows which.
    return [_tuned_scores([run])[0] for run in runs]


def _scores_together(runs: Sequence[ActiveRun]) -> list[list[ExampleScore]]:
    shared, memory = runs[0].shared, runs[0].memory
    title = f"step {runs[0].state.step}" if len(runs) == 1 else f"{len(runs)} runs"
    layer = entry_layer(runs)
    with (
        shared.progress.phase(f"validate {title}", total=len(shared.scored)) as advance,
        memory.phase("evaluate"),
    ):
        return score_adapters(
            shared.base,
            shared.scored,
            adapters=[run.adapter_name for run in runs],
            batch_tokens=bundle_budget(
                [shared.config.eval.batch_tokens] * len(runs),
                device_type=shared.base.device.type,
            ),
            trunk=shared.trunk.store if shared.trunk and layer else None,
            entry_layer=layer,
            progress=shared.stopping(advance),
        )


def entry_layer(runs: Sequence[ActiveRun]) -> int:
    """Returns the layer at which a pass of these runs begins; 0: at the tokens."""
    return min(run.prepared.trunk_layer for run in runs)


def _record_scores(run: ActiveRun, scores: Sequence[ExampleScore], *, model: str) -> None:
    step, total = run.state.step, likelihood(scores)
    row = {"step": step, "model": model, **asdict(total), "perplexity": total.perplexity}
    run.folder.append_eval({**row, "nll_sum_nats": [score.nll_sum_nats for score in scores]})
    run.tracker.log({f"validation/{key}": value for key, value in row.items()}, step=step)
    run.shared.progress.notice(
        f"{run.label}step {step}: validation loss {total.loss_nats_per_token:.4f} nats per "
        f"token, perplexity {perplexity_words(total.perplexity)} ({total.num_examples} examples)"
    )


def recorded_eval(folder: RunFolder, *, step: int, model: str) -> dict[str, Any] | None:
    """Returns the recorded row of a validation, or None."""
    rows = (row for row in folder.evals() if row["step"] == step and row["model"] == model)
    return next(rows, None)


def answer(runs: Sequence[ActiveRun]) -> None:
    """Leaves the greedy answers of base and tuned model in the folder of each open run."""
    unanswered = [run for run in open_only(runs) if not run.folder.has(ANSWERS)]
    if not unanswered or not unanswered[0].shared.prompts:
        return
    shared, memory = unanswered[0].shared, unanswered[0].memory
    untuned = untuned_answers(shared, memory=memory)
    with (
        shared.progress.phase("answer (tuned)", total=len(shared.prompts)) as advance,
        memory.phase("generate"),
    ):
        tuned = answer_with_adapters(
            shared.base,
            shared.prompts,
            adapters=[run.adapter_name for run in unanswered],
            max_new_tokens=shared.config.eval.max_new_tokens,
            batch_size=shared.config.eval.generate_batch_size,
            progress=shared.stopping(advance),
        )
    for run, answers in zip(unanswered, tuned, strict=True):
        with isolate_failure(run):
            run.note(untuned_answers=untuned.origin)
            run.folder.write_json(
                ANSWERS,
                {
                    "base": [asdict(answer) for answer in untuned.items],
                    "tuned": [asdict(answer) for answer in answers],
                },
            )
