"""A bundle of runs from their adapters to their results: the order of events is that of the page.

One run is a bundle of one. Every stage leaves its outcome in the runs' folders, so a bundle that is
stopped anywhere continues from its last checkpoints and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

from loracle.config.run import config_digest
from loracle.engine.out_of_memory import require_address_space
from loracle.engine.step_memory import StepTensors
from loracle.engine.train import StepRecord, train_bundle
from loracle.engine.train_state import capture_state
from loracle.errors import Interrupted, LoracleError, NonFiniteError, OutOfMemory
from loracle.runner.active_run import (
    ActiveRun,
    fail_all,
    isolate_failure,
    open_only,
    open_runs,
)
from loracle.runner.bundle_size import BundleChoice, bundle_budget
from loracle.runner.checkpoint import Snapshot, save_checkpoint
from loracle.runner.evaluation import answer, entry_layer, validate_due
from loracle.runner.failure import as_failure, record_failure
from loracle.runner.finish import audit_weights, finish_run, measure_arm_latency
from loracle.runner.prepare import PreparedRun, fill_trunk
from loracle.runner.probe import ProbeResult
from loracle.runner.run_spec import RunOutcome
from loracle.runner.shared_base import SharedBase

# In the section ``engine`` of environment.json: when memory ran out, and the passes since.
_HALVED = "micro_batch_halved"


def run_bundle(
    shared: SharedBase,
    prepared: Sequence[PreparedRun],
    *,
    choice: BundleChoice,
    probe: Callable[[PreparedRun], ProbeResult] | None,
) -> list[RunOutcome]:
    """Takes the runs of a bundle to their ends; the base is then as it was before.

    Args:
        shared: The base and its data.
        prepared: The runs that train together.
        choice: Bundle size and the reason for it.
        probe: Measures an arm alone; None: the run itself is alone and measures it.

    Raises:
        Interrupted: On SIGINT, SIGTERM or SIGHUP, after a checkpoint of every run.
    """
    runs: list[ActiveRun] = []
    opened: list[ActiveRun | LoracleError] = []
    try:
        fill_trunk(shared, prepared)
        probed = [probe(run) if probe else None for run in prepared]
        opened = open_runs(shared, prepared, choice=choice, probed=probed)
        runs = [run for run in opened if isinstance(run, ActiveRun)]
        with isolate_failure(runs):
            validate_due(runs)
        _train(runs)
        _enter(runs, phase="evaluate")
        with isolate_failure(runs):
            answer(runs)
        for run in open_only(runs):
            with isolate_failure(run):
                run.write_memory()
        _enter(runs, phase="measure")
        trained = open_only(runs)
        digest_after = shared.base.weights_digest() if trained else ""
        for run in trained:
            with isolate_failure(run):
                latency = measure_arm_latency(run)
                audit = audit_weights(run, digest_after=digest_after)
                finish_run(run, latency=latency, audit=audit)
    except BaseException as error:
        if not isinstance(error, Exception) or isinstance(error, LoracleError):
            _leave(runs, error)
            raise
        # It concerns these runs alone; the next bundle may succeed.
        fail_all(runs, error)
        opened = opened or [as_failure(error, run.folder) for run in prepared]
    finally:
        shared.clear()
    outcomes = []
    for folder, ended in zip([run.folder for run in prepared], opened, strict=True):
        if isinstance(ended, LoracleError):
            record_failure(folder, ended)
            outcomes.append(RunOutcome(folder.path, None, ended))
        else:
            outcomes.append(RunOutcome(folder.path, ended.result, ended.error))
    return outcomes


def _leave(runs: Sequence[ActiveRun], error: BaseException) -> None:
    """Closes the runs that something ended from outside; an interrupted one can go on later."""
    for run in open_only(runs):
        # One that has taken all steps saved its state with the last of them.
        if isinstance(error, Interrupted) and not run.state.is_done:
            _checkpoint(run)
        run.tracker.finish(1)


def _enter(runs: Sequence[ActiveRun], *, phase: str) -> None:
    for run in open_only(runs):
        with isolate_failure(run):
            require_address_space(run.prepared.name)
            run.folder.set_status("running", phase=phase, step=run.state.step)


def _train(runs: Sequence[ActiveRun]) -> None:
    """Takes the remaining steps, with validations and checkpoints where they are due."""
    if not runs:
        return
    shared, memory = runs[0].shared, runs[0].memory
    clocked_after = [
        run.state.step + run.config.measure.skip_steps if not run.probe else None for run in runs
    ]
    _enter(runs, phase="train")
    steps = train_bundle(
        shared.base,
        [run.state for run in runs],
        micro_batch_tokens=_pass_tokens(runs),
        trunk=shared.trunk.store if shared.trunk and entry_layer(runs) else None,
        checkpointing=any(run.config.train.gradient_checkpointing for run in runs),
        halved=lambda before, after: _note_halved(runs, before=before, after=after),
    )
    counted = _step_tensors(runs)
    total = sum(run.config.train.max_steps for run in runs)
    done = sum(run.state.step for run in runs)
    with shared.progress.phase("train", total=total, done=done) as advance:
        while any(run.state.is_active for run in runs):
            with memory.phase("train"), counted():
                records = _next_step(steps, runs)
            stepped = _record_step(runs, records, clocked_after=clocked_after)
            advance(len(stepped), detail=_detail([record for record in records if record]))
            shared.stop.check()
            with isolate_failure(stepped):
                validate_due(stepped)
            _checkpoint_due(stepped)


def _step_tensors(runs: Sequence[ActiveRun]) -> Callable[[], AbstractContextManager[object]]:
    """Returns the context of each step: it counts tensors if a run is alone."""
    if len(runs) > 1 or runs[0].probe:
        return nullcontext
    (run,) = runs
    skipped = run.config.measure.skip_steps
    return StepTensors(run.shared.base, run.state, memory=run.memory, num_steps=skipped).step


def _pass_tokens(runs: Sequence[ActiveRun]) -> int:
    """Returns the tokens per pass: of the bundle, or those that fitted when it was stopped."""
    budgets = [run.config.train.micro_batch_tokens for run in runs]
    fitted: list[int] = [
        event["to_tokens"] for run in runs for event in run.environment["engine"].get(_HALVED, [])
    ]
    device_type = runs[0].shared.base.device.type
    return min([bundle_budget(budgets, device_type=device_type), *fitted])


def _note_halved(runs: Sequence[ActiveRun], *, before: int, after: int) -> None:
    """Records that passes are smaller from here on, because memory ran out."""
    for run in open_only(runs):
        step = run.state.step + 1
        event = {"step": step, "from_tokens": before, "to_tokens": after}
        run.note(**{_HALVED: [*run.environment["engine"].get(_HALVED, []), event]})
        run.shared.progress.notice(
            f"{run.label}step {step}: out of memory; passes of {after} tokens from here on "
            f"(train.micro_batch_tokens was {before})"
        )


def _next_step(
    steps: Iterator[list[StepRecord | None]], runs: Sequence[ActiveRun]
) -> list[StepRecord | None]:
    """Returns the records of the next step; None for each run if it could not be taken."""
    try:
        return next(steps)
    except NonFiniteError:
        # Of a single run: its ``failure`` says why, as that of one of several does.
        pass
    except OutOfMemory as error:
        for run in open_only(runs):
            run.fail(error)
    return [None] * len(runs)


def _record_step(
    runs: Sequence[ActiveRun],
    records: Sequence[StepRecord | None],
    *,
    clocked_after: Sequence[int | None],
) -> list[ActiveRun]:
    """Adds a row to ``steps.jsonl`` of each run that took the step, and returns those runs."""
    stepped = []
    for run, record, first in zip(runs, records, clocked_after, strict=True):
        if run.is_open and run.state.failure is not None:
            run.fail(NonFiniteError(run.state.failure))
        if record is None:
            continue
        # A step of a bundle takes the time of all its runs: it is not on the clock of any.
        row = {**asdict(record), "clocked": first is not None and record.step > first}
        with isolate_failure(run):
            run.folder.append_step(row)
            run.tracker.log({f"train/{key}": x for key, x in row.items()}, step=record.step)
            stepped.append(run)
    return stepped


def _detail(records: Sequence[StepRecord]) -> str:
    if not records:
        return ""
    losses = [record.loss_nats_per_token for record in records]
    span = f"{min(losses):.3f}" if len(losses) == 1 else f"{min(losses):.3f} to {max(losses):.3f}"
    return f"loss {span}  {records[0].step_time_s:.2f} s/step"


def _checkpoint_due(runs: Sequence[ActiveRun]) -> None:
    for run in open_only(runs):
        if run.state.is_done or run.state.step % run.config.checkpoint.every_steps == 0:
            with isolate_failure(run):
                _checkpoint(run)


def _checkpoint(run: ActiveRun) -> None:
    run.write_memory()
    tensors, state = capture_state(run.state)
    snapshot = Snapshot(
        step=run.state.step,
        tensors=tensors,
        state={**state, "config_digest": config_digest(run.config)},
        records=run.folder.grown(),
    )
    save_checkpoint(run.folder.checkpoints, snapshot, keep=run.config.checkpoint.keep)
