"""A bundle of runs from their adapters to their results: the order of events is that of the page.

One run is a bundle of one. Every stage leaves its outcome in the runs' folders, so a bundle that is
stopped anywhere continues from its last checkpoints and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from loracle.config.run import config_digest
from loracle.engine.step_memory import StepTensors
from loracle.engine.train import StepRecord, train_bundle
from loracle.engine.train_state import capture_state
from loracle.errors import Interrupted, LoracleError, NonFiniteError, OutOfMemory
from loracle.runner.active_run import (
    Session,
    fail_all,
    guarded,
    guarded_together,
    keep_memory,
    open_sessions,
    record_failure,
)
from loracle.runner.bundle_size import BundleChoice, bundle_budget
from loracle.runner.checkpoint import Snapshot, save_checkpoint
from loracle.runner.evaluation import answer, entry_layer, validate_due
from loracle.runner.finish import (
    conclude,
)
from loracle.runner.outcome import RunOutcome
from loracle.runner.prepare import Member, fill_for
from loracle.runner.probe import Isolated
from loracle.runner.shared_base import Workbench

# In the section ``engine`` of environment.json: when memory ran out, and the passes since.
_HALVED = "micro_batch_halved"


def run_bundle(
    bench: Workbench,
    members: Sequence[Member],
    *,
    choice: BundleChoice,
    isolated: Callable[[Member], Isolated] | None,
) -> list[RunOutcome]:
    """Returns how each run of a bundle ended; the base is then as it was before.

    Args:
        bench: The base and its data.
        members: The runs that train together.
        choice: Why so many.
        isolated: Measures an arm alone; None: the run itself is alone and is its own measure.

    Raises:
        Interrupted: On SIGINT or SIGTERM, after a checkpoint of every run.
    """
    fill_for(bench, members)
    alone = [isolated(member) if isolated else None for member in members]
    failures: dict[Path, LoracleError] = {}
    try:
        sessions = open_sessions(bench, members, choice=choice, isolated=alone, failures=failures)
        _through(sessions)
    finally:
        bench.clear()
    for path, error in failures.items():
        record_failure(next(m.folder for m in members if m.folder.path == path), error)
    ended = {session.folder.path: session for session in sessions}
    return [
        RunOutcome(path, ended[path].result, ended[path].error)
        if path in ended
        else RunOutcome(path, None, failures[path])
        for path in (member.folder.path for member in members)
    ]


def _through(sessions: Sequence[Session]) -> None:
    """Takes the runs to their ends; stopped, it leaves checkpoints from which they go on."""
    try:
        _complete(sessions)
    except BaseException as error:
        for session in sessions:
            if session.is_open:
                if isinstance(error, Interrupted):
                    _checkpoint(session)
                session.tracker.finish(1)
        raise


def _complete(sessions: Sequence[Session]) -> None:
    """Trains to the end, evaluates, measures, audits and writes the results."""
    if not sessions:
        return
    with guarded_together(sessions):
        validate_due(sessions)
    _train(sessions)
    _enter(sessions, phase="evaluate")
    with guarded_together(sessions):
        answer(sessions)
    for session in sessions:
        if session.is_open:
            with guarded(session):
                keep_memory(session)
    _enter(sessions, phase="measure")
    trained = [session for session in sessions if session.is_open]
    digest_after = trained[0].bench.base.weights_digest() if trained else ""
    for session in trained:
        with guarded(session):
            conclude(session, digest_after=digest_after)


def _enter(sessions: Sequence[Session], *, phase: str) -> None:
    for session in sessions:
        if session.is_open:
            with guarded(session):
                session.folder.set_status("running", phase=phase, step=session.run.step)


def _train(sessions: Sequence[Session]) -> None:
    """Takes the remaining steps, with validations and checkpoints where they are due."""
    bench, memory = sessions[0].bench, sessions[0].memory
    clocked_after = [
        session.run.step + session.config.measure.skip_steps if not session.isolated else None
        for session in sessions
    ]
    _enter(sessions, phase="train")
    device_type = bench.base.device.type
    budgets = [session.config.train.micro_batch_tokens for session in sessions]
    bundle = train_bundle(
        bench.base,
        [session.run for session in sessions],
        micro_batch_tokens=_halved_before(
            sessions, bundle_budget(budgets, device_type=device_type)
        ),
        trunk=bench.trunk if entry_layer(sessions) else None,
        checkpointing=any(session.config.train.gradient_checkpointing for session in sessions),
        halved=lambda before, after: _note_halved(sessions, before=before, after=after),
    )
    counted = _step_tensors(sessions)
    total = sum(session.run.train.max_steps for session in sessions)
    done = sum(session.run.step for session in sessions)
    with bench.screen.phase("train", total=total, done=done) as advance:
        while any(session.run.is_active for session in sessions):
            with memory.phase("train"), counted():
                records = _next_step(bundle, sessions)
            stepped = _record_step(sessions, records, clocked_after=clocked_after)
            advance(len(stepped), detail=_detail([record for record in records if record]))
            bench.stop.check()
            with guarded_together(stepped):
                validate_due(stepped)
            _checkpoint_due(stepped)


def _step_tensors(sessions: Sequence[Session]) -> Callable[[], AbstractContextManager[object]]:
    """Returns what gives the block for each step: one that counts tensors, if a run is alone."""
    if len(sessions) > 1 or sessions[0].isolated:
        return nullcontext
    (session,) = sessions
    return StepTensors(
        session.bench.base,
        session.run,
        memory=session.memory,
        num_steps=session.config.measure.skip_steps,
    ).step


def _halved_before(sessions: Sequence[Session], budget: int) -> int:
    """Returns the tokens per pass that fitted when these runs were stopped, or ``budget``."""
    fitted: list[int] = [
        event["to_tokens"]
        for session in sessions
        for event in session.environment["engine"].get(_HALVED, [])
    ]
    return min([budget, *fitted])


def _note_halved(sessions: Sequence[Session], *, before: int, after: int) -> None:
    """Records that passes are smaller from here on, because memory ran out."""
    for session in sessions:
        if session.is_open:
            step = session.run.step + 1
            event = {"step": step, "from_tokens": before, "to_tokens": after}
            session.note(**{_HALVED: [*session.environment["engine"].get(_HALVED, []), event]})
            session.bench.screen.notice(
                f"{session.label}step {step}: out of memory; passes of {after} tokens from here on "
                f"(train.micro_batch_tokens was {before})"
            )


def _next_step(
    bundle: Iterator[list[StepRecord | None]], sessions: Sequence[Session]
) -> list[StepRecord | None]:
    """Returns the records of the next step; of a single run that broke, None."""
    try:
        return next(bundle)
    except NonFiniteError:
        # Its ``failure`` says why, as that of one of several does.
        return [None]
    except OutOfMemory as error:
        fail_all(sessions, error)
        return [None] * len(sessions)


def _record_step(
    sessions: Sequence[Session],
    records: Sequence[StepRecord | None],
    *,
    clocked_after: Sequence[int | None],
) -> list[Session]:
    """Adds a row to ``steps.jsonl`` of each run that took the step, and returns those runs."""
    stepped = []
    for session, record, first in zip(sessions, records, clocked_after, strict=True):
        if session.is_open and session.run.failure is not None:
            session.fail(NonFiniteError(session.run.failure))
        if record is None:
            continue
        # A step of a bundle takes the time of all its runs: it is not on the clock of any.
        row = {**asdict(record), "clocked": first is not None and record.step > first}
        with guarded(session):
            session.folder.append_step(row)
            session.tracker.log(
                {f"train/{key}": value for key, value in row.items()}, step=record.step
            )
            stepped.append(session)
    return stepped


def _detail(records: Sequence[StepRecord]) -> str:
    if not records:
        return ""
    losses = [record.loss_nats_per_token for record in records]
    span = f"{min(losses):.3f}" if len(losses) == 1 else f"{min(losses):.3f} to {max(losses):.3f}"
    return f"loss {span}  {records[0].step_time_s:.2f} s/step"


def _checkpoint_due(sessions: Sequence[Session]) -> None:
    for session in sessions:
        every = session.config.checkpoint.every_steps
        if session.is_open and (session.run.is_done or session.run.step % every == 0):
            with guarded(session):
                _checkpoint(session)


def _checkpoint(session: Session) -> None:
    keep_memory(session)
    tensors, state = capture_state(session.run)
    snapshot = Snapshot(
        step=session.run.step,
        tensors=tensors,
        state={**state, "config_digest": config_digest(session.config)},
    )
    save_checkpoint(
        session.folder.path / "checkpoints", snapshot, keep=session.config.checkpoint.keep
    )
