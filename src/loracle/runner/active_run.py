"""Runs in progress: adapters on the base, records open, state where it was left.

A run is requested as a `RunSpec`, resolved to a `PreparedRun`, alive as an `ActiveRun`, and read
back as a `loracle.records.study_folder.RunRecord`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from loracle.config.run import Config, config_digest
from loracle.engine.measure import MemoryMeter
from loracle.engine.out_of_memory import memory_faults
from loracle.engine.train_state import TrainState, restore_state
from loracle.errors import Interrupted, LoracleError, OutOfMemory, RunFolderError
from loracle.records.names import CHECKPOINTS, DATA, ENVIRONMENT, MEMORY, MODULES, STEPS
from loracle.records.result import RunResult
from loracle.records.rows import contents_up_to
from loracle.records.run_folder import RunFolder
from loracle.records.signature import environment_differences
from loracle.runner.bundle_size import BundleChoice
from loracle.runner.checkpoint import load_latest, sound_steps
from loracle.runner.failure import as_failure, record_failure
from loracle.runner.place import PATHS_FROM, recorded_start
from loracle.runner.prepare import PreparedRun
from loracle.runner.probe import ProbeResult
from loracle.runner.shared_base import SharedBase
from loracle.runner.tracking import Tracker, open_tracker

# PEFT saves an adapter of this name without a folder of its own.
DEFAULT_ADAPTER = "default"

_LESS_AT_A_TIME = "lower eval.batch_tokens or eval.generate_batch_size"


@dataclass
class ActiveRun:
    """A run in progress: the prepared run, its training state and its open records."""

    shared: SharedBase
    prepared: PreparedRun
    state: TrainState
    environment: dict[str, Any]
    """As ``environment.json`` holds it."""
    memory: MemoryMeter
    """Peaks of the bundle; of this run if it is alone."""
    probe: ProbeResult | None
    """Cost of its arm alone; None: the run itself is alone and measures it."""
    tracker: Tracker
    error: LoracleError | None = None
    """Why the run failed."""
    result: RunResult | None = None
    """Its result, once the run has completed."""

    @property
    def folder(self) -> RunFolder:
        """Its open folder."""
        return self.prepared.folder

    @property
    def config(self) -> Config:
        """Its resolved configuration."""
        return self.prepared.config

    @property
    def adapter_name(self) -> str:
        """Name of its adapter on the base."""
        return self.state.adapter.name

    @property
    def is_open(self) -> bool:
        """True until the run has a result or has failed."""
        return self.error is None and self.result is None

    @property
    def label(self) -> str:
        """Prefix of a line on the screen about this run; empty if it is alone."""
        return "" if self.adapter_name == DEFAULT_ADAPTER else f"{self.prepared.name}: "

    def fail(self, error: LoracleError) -> None:
        """Records the failure in the run's folder; the other runs continue."""
        self.error = error
        # The step loop leaves out a run that has failed.
        self.state.failure = str(error)
        record_failure(self.folder, error)
        self.tracker.finish(1)

    def note(self, **facts: Any) -> None:
        """Adds facts to the section ``engine`` of ``environment.json``."""
        self.environment["engine"] |= facts
        self.folder.write_json(ENVIRONMENT, self.environment)

    def write_memory(self) -> None:
        """Leaves the peaks so far for a resumed run, unless other runs share them."""
        if self.probe is None:
            self.folder.write_json(MEMORY, self.memory.to_json())


def open_only(runs: Sequence[ActiveRun]) -> list[ActiveRun]:
    """Returns the runs that have neither completed nor failed."""
    return [run for run in runs if run.is_open]


@contextmanager
def isolate_failure(runs: ActiveRun | Sequence[ActiveRun]) -> Iterator[None]:
    """Turns an error inside the block into the failure of these runs, so that others continue.

    Whatever goes wrong in the work of one run is its own. Of a pass that a sequence of runs shares
    running out of memory is theirs, and what a library raises; what we raise on purpose concerns
    the base and passes through.
    """
    failing = [runs] if isinstance(runs, ActiveRun) else runs
    is_shared = failing is runs
    where = "evaluation" if is_shared else failing[0].prepared.name
    try:
        with memory_faults(where, remedy=_LESS_AT_A_TIME):
            yield
    except Interrupted:
        raise
    except LoracleError as error:
        if is_shared and not isinstance(error, OutOfMemory):
            raise
        for run in open_only(failing):
            run.fail(error)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is recorded
        fail_all(failing, error)


def fail_all(runs: Sequence[ActiveRun], error: Exception) -> None:
    """Makes an exception that nobody foresaw the failure of the runs that are still open."""
    for run in open_only(runs):
        run.fail(as_failure(error, run.folder))


def open_runs(
    shared: SharedBase,
    prepared: Sequence[PreparedRun],
    *,
    choice: BundleChoice,
    probed: Sequence[ProbeResult | None],
) -> list[ActiveRun | LoracleError]:
    """Attaches the adapters of a bundle and restores its runs; an error where a run cannot open."""
    memory = shared.meter()
    names = adapter_names([run.name for run in prepared])
    engine = {"bundle": {**asdict(choice), "size": len(prepared)}}
    opened: list[ActiveRun | LoracleError] = []
    for run, name, probe in zip(prepared, names, probed, strict=True):
        try:
            opened.append(_open(shared, run, name=name, engine=engine, memory=memory, probe=probe))
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a library raises is recorded
            opened.append(as_failure(error, run.folder))
    runs = [run for run in opened if isinstance(run, ActiveRun)]
    for active, step in zip(runs, _common_steps(runs), strict=True):
        with isolate_failure(active):
            _restore(active, up_to=step)
    return opened


def adapter_names(folders: Sequence[str]) -> list[str]:
    """Returns a name in PEFT for each run: the default one if it is alone."""
    if len(folders) == 1:
        return [DEFAULT_ADAPTER]
    # PEFT keeps adapters in module dictionaries, where a dot or the name of a method cannot be.
    slugs = [re.sub(r"[^A-Za-z0-9-]+", "-", folder) for folder in folders]
    return [f"run{index}-{slug}" for index, slug in enumerate(slugs, 1)]


def _open(
    shared: SharedBase,
    prepared: PreparedRun,
    *,
    name: str,
    engine: dict[str, Any],
    memory: MemoryMeter,
    probe: ProbeResult | None,
) -> ActiveRun:
    folder, config = prepared.folder, prepared.config
    if probe is None and folder.has(MEMORY):
        memory.remember(folder.read_json(MEMORY))
    environment = _record_inputs(shared, prepared, engine=engine)
    return ActiveRun(
        shared=shared,
        prepared=prepared,
        state=shared.new_run(config, plan=prepared.plan, name=name),
        environment=environment,
        memory=memory,
        probe=probe,
        tracker=open_tracker(
            mode=config.tracking.mode,
            project=config.tracking.project,
            name=prepared.name,
            config=config.model_dump(mode="json"),
            folder=folder.path,
            notice=shared.progress.notice,
        ),
    )


def _record_inputs(
    shared: SharedBase, prepared: PreparedRun, *, engine: dict[str, Any]
) -> dict[str, Any]:
    """Writes what the run starts from; returns its environment."""
    folder = prepared.folder
    engine = {**engine, **prepared.spec.notes}
    start = {PATHS_FROM: recorded_start(folder.path)}
    environment = {**shared.environment, **start, "engine": engine}
    if folder.has(MODULES):
        before = folder.read_json(ENVIRONMENT) if folder.has(ENVIRONMENT) else environment
        changed = environment_differences(before, environment)
        if changed:
            shared.progress.notice(f"resuming in another environment: {'; '.join(changed)}")
        environment["engine"] = {**before.get("engine", {}), **engine}
    folder.write_json(ENVIRONMENT, environment)
    folder.write_json(DATA, shared.data.report)
    folder.write_json(MODULES, prepared.plan.to_json())
    return environment


def _common_steps(runs: Sequence[ActiveRun]) -> list[int | None]:
    """Returns the latest step that each run of a bundle may continue from; None: its newest.

    A bundle that was killed between two checkpoints goes back to the step that all of them have:
    then it takes the same steps together as if nothing had happened, and ends with the same bits.
    """
    newest: list[int | None] = [None] * len(runs)
    if len(runs) <= 1:
        return newest
    steps = [[0, *sound_steps(run.folder.checkpoints)] for run in runs]
    ends = [run.config.train.max_steps for run in runs]
    unfinished = [saved[-1] for saved, end in zip(steps, ends, strict=True) if saved[-1] < end]
    together = min(unfinished, default=max(ends))
    common = [min(together, end) for end in ends]
    if all(step in saved for step, saved in zip(common, steps, strict=True)):
        return list(common)
    return newest


def _restore(run: ActiveRun, *, up_to: int | None) -> None:
    """Puts the run and its records back to the newest checkpoint, or to step 0."""
    folder, notice = run.folder, run.shared.progress.notice
    snapshot = load_latest(folder.checkpoints, notice=notice, up_to=up_to)
    if snapshot is not None:
        digest = config_digest(folder.config)
        if snapshot.state["config_digest"] != digest:
            raise RunFolderError(
                f"{run.prepared.name}: its checkpoint belongs to another configuration "
                f"({snapshot.state['config_digest']}, not {digest})"
            )
        restore_state(run.state, tensors=snapshot.tensors, state=snapshot.state)
        notice(f"resuming after step {run.state.step} of {run.config.train.max_steps}")
    records = snapshot.records if snapshot else {}
    if snapshot and not records:
        records = contents_up_to(folder.path, step=snapshot.step)
    folder.put_back(records)
    for text in folder.notices:
        notice(text)
    _require_rows(run)


def _require_rows(run: ActiveRun) -> None:
    """Raises if records do not reach the step at which the run goes on."""
    rows = len(run.folder.steps())
    if rows != run.state.step:
        raise RunFolderError(
            f"{run.prepared.name}: {STEPS} has {rows} of the {run.state.step} steps of its "
            f"checkpoint; restore it, or remove the folder {CHECKPOINTS} to start over"
        )
