"""The stages of a bundle besides training; each leaves its outcome in the runs' folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loracle.audit import Audit, audit_run, audit_whole
from loracle.bundle import bundle_budget
from loracle.durable import disk_faults, plain_os_errors
from loracle.errors import Interrupted, LoracleError, NonFiniteError, OutOfMemory
from loracle.evaluate import (
    Answer,
    ExampleScore,
    TextScore,
    answer_with_adapters,
    likelihood,
    score_adapters,
    score_answers,
)
from loracle.isolated import latency_of
from loracle.measure import Latency
from loracle.memory_limit import memory_faults
from loracle.model.adapters import save_adapter
from loracle.model.whole import WEIGHTS, save_whole
from loracle.placement import ModulePlan
from loracle.record import RunFolder
from loracle.session import Session
from loracle.untuned import untuned_answers, untuned_scores

_LESS_AT_A_TIME = "lower eval.batch_tokens or eval.generate_batch_size"


@contextmanager
def guarded(session: Session) -> Iterator[None]:
    """Makes an error inside the block the failure of this run, so that the others go on."""
    try:
        with memory_faults(session.folder.path.name, remedy=_LESS_AT_A_TIME):
            yield
    except Interrupted:
        raise
    except LoracleError as error:
        session.fail(error)


@contextmanager
def guarded_together(sessions: Sequence[Session]) -> Iterator[None]:
    """Makes running out of memory inside the block the failure of all these runs."""
    try:
        with memory_faults("evaluation", remedy=_LESS_AT_A_TIME):
            yield
    except OutOfMemory as error:
        fail_all(sessions, error)


def fail_all(sessions: Sequence[Session], error: LoracleError) -> None:
    """Records a failure in which runs that are computed together all have a part."""
    for session in sessions:
        if session.is_open:
            session.fail(error)


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
    step, every = session.run.step, session.config.eval.every_steps
    due = step == 0 or session.run.is_done or (every > 0 and step % every == 0)
    model = "base" if step == 0 else "tuned"
    return due and recorded_eval(session.folder, step=step, model=model) is None


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


def recorded_scores(session: Session, *, step: int, model: str) -> list[ExampleScore]:
    """Returns the scores of each example of a validation that was done."""
    row = recorded_eval(session.folder, step=step, model=model)
    assert row is not None, f"no validation of {model} at step {step}"
    pairs = zip(session.bench.scored, row["nll_sum_nats"], strict=True)
    return [ExampleScore(example.num_targets, nll) for example, nll in pairs]


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


def recorded_answers(session: Session) -> dict[str, list[Answer]]:
    """Returns the greedy answers of base and tuned model; empty lists if none were wanted."""
    if not session.bench.prompts:
        return {"base": [], "tuned": []}
    kept = session.folder.read_json("answers.json")
    return {key: [Answer(**answer) for answer in kept[key]] for key in kept}


def text_score(session: Session, answers: Sequence[Answer]) -> TextScore | None:
    """Returns BLEU and chrF of the answers; None if there are none."""
    references = [example.record.output for example in session.bench.answered]
    return score_answers(answers, references=references) if answers else None


def session_latency(session: Session) -> dict[str, Latency | None]:
    """Returns the latency of the arm alone; of full fine-tuning none, it is the base's."""
    if session.plan.is_full:
        return dict.fromkeys(("base", "unmerged", "merged"))
    if session.isolated is not None:
        return dict(session.isolated.latency)
    return latency_of(session.bench, adapter=session.adapter.name)


def audit_of(session: Session, scores: Sequence[ExampleScore], *, digest_after: str) -> Audit:
    """Saves the adapter and proves the run; see ``audit.Audit`` for the claims.

    Args:
        session: The run, trained.
        scores: Its final scores.
        digest_after: ``base.weights_digest()`` from after training.
    """
    bench = session.bench
    saved = _save(session)
    examples = bench.scored[: session.config.audit.reload_examples]
    with bench.screen.phase(f"{session.label}audit", total=len(examples)) as advance:
        given: dict[str, Any] = {
            "saved": saved,
            "model_folder": bench.model.path,
            "examples": examples,
            "scores": scores[: len(examples)],
            "progress": bench.stopping(advance),
        }
        if session.plan.is_full:
            return audit_whole(bench.base, trained=session.adapter, **given)
        return audit_run(
            bench.base,
            adapter=session.adapter,
            digest_before=bench.weights_digest,
            digest_after=digest_after,
            **given,
        )


def saved_weights(run: Path, *, plan: ModulePlan) -> Path:
    """Returns the file of what a run trained: its adapter's, or the whole model's."""
    if plan.is_full:
        return run / "model" / WEIGHTS
    return run / "adapter" / "adapter_model.safetensors"


def _save(session: Session) -> Path:
    """Writes what was trained to ``adapter`` or ``model`` of the run's folder, and returns that.

    The adapter's files lie there whatever it is called on the base.
    """
    folder = saved_weights(session.folder.path, plan=session.plan).parent
    with disk_faults(folder), plain_os_errors():
        if session.plan.is_full:
            return save_whole(session.bench.base, folder=folder)
        written = save_adapter(session.bench.base, name=session.adapter.name, folder=folder)
        if written != folder:
            for file in written.iterdir():
                file.replace(folder / file.name)
            written.rmdir()
    return folder
