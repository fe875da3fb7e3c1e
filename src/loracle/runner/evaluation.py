"""The stages of a bundle besides training; each leaves its outcome in the runs' folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loracle.engine.evaluate import (
    ExampleScore,
    answer_with_adapters,
    likelihood,
    score_adapters,
)
from loracle.errors import NonFiniteError
from loracle.records.run_folder import RunFolder
from loracle.runner.active_run import Session, guarded
from loracle.runner.bundle_size import bundle_budget
from loracle.runner.untuned import untuned_answers, untuned_scores


def validate_due(sessions: Sequence[Session]) -> None:
    """Scores the validation set for the runs that are due and have not recorded it yet."""
    due = [session for session in sessions if session.is_open and _is_due(session)]
    for session in due:
        if session.run.step == 0:
            with guarded(session):
                _record_untuned(session)
    tuned = [session for session in due if session.run.step > 0]
    for session, scores in zip(tuned, _tuned_scores(tuned), strict=True):
        if scores is not None:
            with guarded(session):
                _record_scores(session, scores, model="tuned")


def _is_due(session: Session) -> bool:
    step = session.run.step
    model = "base" if step == 0 else "tuned"
    return (
        session.config.validates_at(step)
        and recorded_eval(session.folder, step=step, model=model) is None
    )


def _record_untuned(session: Session) -> None:
    scores, known = untuned_scores(session.bench, memory=session.memory)
    session.note(untuned_scores="known" if known else "computed")
    _record_scores(session, scores, model="base")


def _tuned_scores(sessions: Sequence[Session]) -> list[list[ExampleScore] | None]:
    """Returns the scores of each run, in one pass for all; None for a run that failed here."""
    if not sessions:
        return []
    try:
        return list(_scores_together(sessions))
    except NonFiniteError as error:
        if len(sessions) == 1:
            sessions[0].fail(error)
            return [None]
    # One of them is broken: which one, and what the others are, is found out one by one.
    return [_tuned_scores([session])[0] for session in sessions]


def _scores_together(sessions: Sequence[Session]) -> list[list[ExampleScore]]:
    bench, memory = sessions[0].bench, sessions[0].memory
    steps = {session.run.step for session in sessions}
    what = f"step {min(steps)}" if len(sessions) == 1 else f"{len(sessions)} runs"
    entry = entry_layer(sessions)
    with (
        bench.screen.phase(f"validate {what}", total=len(bench.scored)) as advance,
        memory.phase("evaluate"),
    ):
        return score_adapters(
            bench.base,
            bench.scored,
            adapters=[session.adapter.name for session in sessions],
            batch_tokens=bundle_budget(
                [bench.config.eval.batch_tokens] * len(sessions),
                device_type=bench.base.device.type,
            ),
            trunk=bench.trunk if entry else None,
            entry_layer=entry,
            progress=bench.stopping(advance),
        )


def entry_layer(sessions: Sequence[Session]) -> int:
    """Returns the layer from which these runs are computed together; 0: from the tokens."""
    return min(session.trunk_layer for session in sessions)


def _record_scores(session: Session, scores: Sequence[ExampleScore], *, model: str) -> None:
    step, found = session.run.step, likelihood(scores)
    row = {"step": step, "model": model, **asdict(found), "perplexity": found.perplexity}
    session.folder.append_eval({**row, "nll_sum_nats": [score.nll_sum_nats for score in scores]})
    session.tracker.log({f"validation/{key}": value for key, value in row.items()}, step=step)
    session.bench.screen.notice(
        f"{session.label}step {step}: validation loss {found.loss_nats_per_token:.4f} nats per "
        f"token, perplexity {found.perplexity:.3f} ({found.num_examples} examples)"
    )


def recorded_eval(folder: RunFolder, *, step: int, model: str) -> dict[str, Any] | None:
    """Returns the row of a validation that was done, or None."""
    rows = (row for row in folder.evals() if row["step"] == step and row["model"] == model)
    return next(rows, None)


def answer(sessions: Sequence[Session]) -> None:
    """Leaves the greedy answers of base and tuned model in each run's ``answers.json``."""
    todo = [s for s in sessions if s.is_open and not (s.folder.path / "answers.json").exists()]
    if not todo:
        return
    bench, memory = todo[0].bench, todo[0].memory
    if not bench.prompts:
        return
    base, known = untuned_answers(bench, memory=memory)
    with (
        bench.screen.phase("answer (tuned)", total=len(bench.prompts)) as advance,
        memory.phase("generate"),
    ):
        tuned = answer_with_adapters(
            bench.base,
            bench.prompts,
            adapters=[session.adapter.name for session in todo],
            max_new_tokens=bench.config.eval.max_new_tokens,
            batch_size=bench.config.eval.generate_batch_size,
            progress=bench.stopping(advance),
        )
    for session, own in zip(todo, tuned, strict=True):
        with guarded(session):
            session.note(untuned_answers="known" if known else "computed")
            answers = {"base": base, "tuned": own}
            session.folder.write_json(
                "answers.json", {key: [asdict(one) for one in answers[key]] for key in answers}
            )
