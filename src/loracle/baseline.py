"""One run from configuration to result: prepare, train, evaluate, measure, audit, record.

The order on the page is the order of events. Every stage leaves its outcome in the run folder, so a
run that is stopped anywhere continues from its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from loracle.audit import require_sound
from loracle.checkpoint import Snapshot, save_checkpoint
from loracle.config import Config, config_digest
from loracle.criteria import Repeat
from loracle.device import keep_large_blocks
from loracle.durable import disk_faults, read_json, read_jsonl
from loracle.errors import Interrupted, LoracleError, UsageError
from loracle.record import RunFolder, Status
from loracle.result import Measured, build_result, example_rows
from loracle.runs import completed_runs
from loracle.screen import Screen
from loracle.session import Session, prepare
from loracle.signals import StopRequest
from loracle.sources.spec import parse_source
from loracle.stages import (
    answer,
    audit_of,
    evaluate_if_due,
    latency_of,
    recorded_scores,
    text_score,
)
from loracle.tracking import Tracker, open_tracker
from loracle.train import StepRecord, capture_state, train_bundle


def run_baseline(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Returns the result of one run, as ``result.json`` holds it.

    Args:
        config: The resolved configuration.
        out: The run folder; created, or continued with ``resume``.
        resume: Continue the run in ``out``; a finished one is only read.
        screen: Where progress is shown; None: standard error.

    Raises:
        UsageError: If something the user or a file gave cannot be used; nothing is left behind.
        RunFailed: If the run cannot go on or fails its audit; the folder says why.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint.
    """
    screen = screen or Screen()
    config = portable_config(config)
    keep_large_blocks()
    with _open_folder(out, config=config, resume=resume) as folder, StopRequest() as stop:
        if folder.is_finished:
            return folder.read_json("result.json")
        with _recording_failure(folder):
            session = prepare(folder, config=config, screen=screen, stop=stop)
            with _tracking(session) as tracker:
                return _complete(session, tracker)


def portable_config(config: Config) -> Config:
    """Returns the config with local sources spelled without this machine's folders."""
    data = config.data.model_copy(update={"source": _portable(config.data.source)})
    return config.model_copy(update={"model": _portable(config.model), "data": data})


def _portable(source: str) -> str:
    return parse_source(source).canonical if source.startswith("path:") else source


@contextmanager
def _open_folder(out: Path, *, config: Config, resume: bool) -> Iterator[RunFolder]:
    """Opens the run folder; one that is new and never got to train is taken away again."""
    with disk_faults(out):
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        opened = (
            RunFolder.reopen(out, config=config) if resume else RunFolder.create(out, config=config)
        )
    except UsageError as error:
        # Refused by the disk half-way; a folder that is held or was there before is not ours.
        if isinstance(error.__cause__, OSError) and out in missing:
            _take_away(out, missing=missing)
        raise
    with opened as folder:
        try:
            yield folder
        except UsageError:
            if not resume and not (out / "modules.json").exists():
                _take_away(out, missing=missing)
            raise


def _take_away(out: Path, *, missing: Sequence[Path]) -> None:
    """Removes a run folder that came to nothing, and the folders above it that were made for it."""
    shutil.rmtree(out, ignore_errors=True)
    # A parent that is not empty any more stays, and so do those above it.
    with suppress(OSError):
        if out not in missing:
            out.mkdir()
        for folder in missing[1:]:
            folder.rmdir()


@contextmanager
def _recording_failure(folder: RunFolder) -> Iterator[None]:
    """Leaves the reason of a failed or interrupted run in its folder, without the folder's path."""
    try:
        yield
    except LoracleError as error:
        status: Status = "interrupted" if isinstance(error, Interrupted) else "failed"
        reason = str(error).replace(str(folder.path), folder.path.name)
        folder.set_status(status, error=reason)
        raise


@contextmanager
def _tracking(session: Session) -> Iterator[Tracker]:
    """Mirrors the record to W&B; a run that ends in an error is closed as failed there."""
    tracking = session.config.tracking
    tracker = open_tracker(
        mode=tracking.mode,
        project=tracking.project,
        name=session.folder.path.name,
        config=session.config.model_dump(mode="json"),
        folder=session.folder.path,
        notice=session.screen.notice,
    )
    try:
        yield tracker
    except BaseException:
        tracker.finish(1)
        raise
    tracker.finish(0)


def _complete(session: Session, tracker: Tracker) -> dict[str, Any]:
    """Trains to the end, evaluates, measures, audits and writes the result."""
    folder = session.folder
    try:
        evaluate_if_due(session, tracker)
        _train(session, tracker)
        folder.set_status("running", phase="evaluate", step=session.run.step)
        base_scores = recorded_scores(session, step=0, model="base")
        tuned_scores = recorded_scores(session, step=session.run.step, model="tuned")
        answers = answer(session)
        folder.set_status("running", phase="measure")
        latency = latency_of(session)
        audit = audit_of(session, tuned_scores)
    except Interrupted:
        _checkpoint(session)
        raise
    measured = Measured(
        base_scores=base_scores,
        tuned_scores=tuned_scores,
        base_text=text_score(session, answers["base"]),
        tuned_text=text_score(session, answers["tuned"]),
        step_rows=folder.steps(),
        memory=session.memory,
        latency=latency,
        audit=audit,
        adapter_sha256=sha256_of(folder.path / "adapter" / "adapter_model.safetensors"),
    )
    result = build_result(
        config=session.config,
        signature=session.signature,
        environment=session.environment,
        plan=session.plan,
        train_examples=len(session.data.train),
        measured=measured,
        repeats=_repeats(session),
    )
    rows = example_rows(
        session.data.validation,
        base_scores=base_scores,
        tuned_scores=tuned_scores,
        answers=answers,
    )
    folder.write_jsonl("examples.jsonl", rows)
    folder.write_json("result.json", result)
    (folder.path / "answers.json").unlink(missing_ok=True)
    tracker.summarize(result)
    require_sound(audit)
    folder.set_status("completed", phase="done", step=session.run.step)
    return result


def _train(session: Session, tracker: Tracker) -> None:
    """Takes the remaining steps, with validations and checkpoints where they are due."""
    run, config = session.run, session.config
    skip_until = run.step + config.measure.skip_steps
    session.folder.set_status("running", phase="train", step=run.step)
    bundle = train_bundle(session.base, [run], micro_batch_tokens=session.micro_batch_tokens)
    with session.screen.phase("train", total=run.train.max_steps, done=run.step) as advance:
        while not run.is_done:
            with session.memory.phase("train"):
                (record,) = cast("list[StepRecord]", next(bundle))
            row = {**asdict(record), "clocked": run.step > skip_until}
            session.folder.append_step(row)
            tracker.log({f"train/{key}": value for key, value in row.items()}, step=run.step)
            advance(
                detail=f"loss {record.loss_nats_per_token:.3f}  {record.step_time_s:.2f} s/step"
            )
            session.stop.check()
            evaluate_if_due(session, tracker)
            if run.is_done or run.step % config.checkpoint.every_steps == 0:
                _checkpoint(session)


def _checkpoint(session: Session) -> None:
    tensors, state = capture_state(session.run)
    snapshot = Snapshot(
        step=session.run.step,
        tensors=tensors,
        state={**state, "config_digest": config_digest(session.config)},
    )
    save_checkpoint(
        session.folder.path / "checkpoints", snapshot, keep=session.config.checkpoint.keep
    )


def _repeats(session: Session) -> list[Repeat]:
    """Returns the finished runs beside this one that have its signature."""
    found = []
    for path in completed_runs(session.folder.path.parent):
        repeat = read_repeat(path, signature=session.signature)
        if repeat is not None and path != session.folder.path:
            found.append(repeat)
    return found


def read_repeat(path: Path, *, signature: str) -> Repeat | None:
    """Returns what a finished run is compared by, or None if it is another run."""
    result = read_json(path / "result.json")
    if result["signature"] != signature:
        return None
    return Repeat(
        name=path.name,
        adapter_sha256=result["adapter_sha256"],
        losses=tuple(row["loss_nats_per_token"] for row in read_jsonl(path / "steps.jsonl")),
        final_loss_nats_per_token=result["quality"]["tuned"]["loss_nats_per_token"],
    )


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
