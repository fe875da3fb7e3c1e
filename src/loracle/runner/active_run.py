"""A run in progress: its folder, its adapter on the base, its state where it was left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.config.run import Config, config_digest
from loracle.engine.measure import MemoryMeter
from loracle.engine.out_of_memory import memory_faults
from loracle.engine.train_state import TrainingRun, restore_state
from loracle.errors import Interrupted, LoracleError, OutOfMemory, RunFolderError
from loracle.model.adapters import Adapter
from loracle.placement import ModulePlan
from loracle.records.result import RunResult
from loracle.records.run_folder import RunFolder
from loracle.records.signature import environment_differences, signature
from loracle.runner.bundle_size import BundleChoice
from loracle.runner.checkpoint import load_latest, sound_steps
from loracle.runner.prepare import Member
from loracle.runner.probe import Isolated
from loracle.runner.shared_base import TrunkUse, Workbench
from loracle.runner.tracking import Tracker, open_tracker

# PEFT saves an adapter of this name without a folder of its own.
ADAPTER = "default"


# Peaks of a run in progress, so that one that goes on in another process keeps them.
MEMORY = "memory.json"


@dataclass
class Session:
    """A run in progress and everything it needs."""

    bench: Workbench
    folder: RunFolder
    config: Config
    arm: str
    plan: ModulePlan
    adapter: Adapter
    run: TrainingRun
    environment: dict[str, Any]
    signature: str
    memory: MemoryMeter
    """Of the bundle; of this run alone, if it is alone."""
    isolated: Isolated | None
    """What was measured of this arm alone; None: the run itself is alone."""
    tracker: Tracker
    trunk: TrunkUse | None
    """The kept states that the arm begins from; None: it begins from the tokens."""
    error: LoracleError | None = None
    """Why the run failed."""
    result: RunResult | None = None

    @property
    def is_open(self) -> bool:
        """True until the run has a result or has failed."""
        return self.error is None and self.result is None

    @property
    def trunk_layer(self) -> int:
        """First decoder layer that is computed for it; 0: all are."""
        return self.trunk.layer if self.trunk else 0

    @property
    def label(self) -> str:
        """Says which run a line on the screen is about, where there are several."""
        return "" if self.adapter.name == ADAPTER else f"{self.folder.path.name}: "

    def fail(self, error: LoracleError) -> None:
        """Records the failure in the run's folder; the other runs go on."""
        self.error = error
        # The step loop leaves out a run that has failed.
        self.run.failure = str(error)
        record_failure(self.folder, error)
        self.tracker.finish(1)

    def note(self, **facts: Any) -> None:
        """Adds to the section ``engine`` of ``environment.json`` what was not computed, and why."""
        self.environment["engine"] |= facts
        self.folder.write_json("environment.json", self.environment)


def record_failure(folder: RunFolder, error: LoracleError) -> None:
    """Leaves the reason of a failed run in its folder, without the folder's path."""
    reason = str(error).replace(str(folder.path), folder.path.name)
    # A disk that is full cannot take the news of it.
    with suppress(RunFolderError):
        folder.set_status("failed", error=reason)


def open_sessions(
    bench: Workbench,
    members: Sequence[Member],
    *,
    choice: BundleChoice,
    isolated: Sequence[Isolated | None],
    failures: dict[Path, LoracleError],
) -> list[Session]:
    """Attaches the adapters of a bundle, and puts its runs back to where they were left.

    Args:
        bench: The base and its data.
        members: The runs of the bundle.
        choice: Why so many.
        isolated: What was measured of each alone, if anything.
        failures: Gets the error of each run that cannot be opened, by its folder.
    """
    memory = bench.meter()
    names = adapter_names([member.folder.path.name for member in members])
    engine = {"bundle": {**choice.to_json(), "size": len(members)}}
    sessions = []
    for member, name, alone in zip(members, names, isolated, strict=True):
        try:
            session = _open(bench, member, name=name, engine=engine, memory=memory, isolated=alone)
            sessions.append(session)
        except LoracleError as error:
            failures[member.folder.path] = error
    for session, step in zip(sessions, _common_steps(sessions), strict=True):
        try:
            _restore(session, up_to=step)
        except LoracleError as error:
            session.fail(error)
    return sessions


def keep_memory(session: Session) -> None:
    """Leaves the peaks so far in the run's folder, unless others share them."""
    if session.isolated is None:
        session.folder.write_json(MEMORY, session.memory.to_json())


def adapter_names(folders: Sequence[str]) -> list[str]:
    """Returns a name in PEFT for each run: the default one if it is alone."""
    if len(folders) == 1:
        return [ADAPTER]
    # PEFT keeps adapters in module dictionaries, where a dot or the name of a method cannot be.
    slugs = [re.sub(r"[^A-Za-z0-9-]+", "-", folder) for folder in folders]
    return [f"run{index}-{slug}" for index, slug in enumerate(slugs, 1)]


def _open(
    bench: Workbench,
    member: Member,
    *,
    name: str,
    engine: dict[str, Any],
    memory: MemoryMeter,
    isolated: Isolated | None,
) -> Session:
    folder, config, plan = member.folder, member.config, member.plan
    if isolated is None and (folder.path / MEMORY).exists():
        memory.remember(folder.read_json(MEMORY))
    environment = _record_inputs(bench, member, engine=engine)
    run = bench.new_run(config, plan=plan, name=name)
    return Session(
        bench=bench,
        folder=folder,
        config=config,
        arm=member.arm,
        plan=plan,
        adapter=run.adapter,
        run=run,
        environment=environment,
        signature=signature(
            config=config,
            model=f"{config.model}@{bench.model.revision}",
            data=bench.data.fingerprint,
            placement=plan.placement,
            environment=environment,
        ),
        memory=memory,
        isolated=isolated,
        tracker=_tracker(member, notice=bench.screen.notice),
        trunk=bench.trunk_uses.get(member.trunk_layer),
    )


def _tracker(member: Member, *, notice: Callable[[str], None]) -> Tracker:
    tracking = member.config.tracking
    return open_tracker(
        mode=tracking.mode,
        project=tracking.project,
        name=member.folder.path.name,
        config=member.config.model_dump(mode="json"),
        folder=member.folder.path,
        notice=notice,
    )


def _record_inputs(bench: Workbench, member: Member, *, engine: dict[str, Any]) -> dict[str, Any]:
    """Writes what the run starts from; returns its environment."""
    folder = member.folder
    engine = {**engine, **member.notes}
    environment = {**bench.environment, "engine": engine}
    if (folder.path / "modules.json").exists():
        before = folder.read_json("environment.json")
        changed = environment_differences(before, environment)
        if changed:
            bench.screen.notice(f"resuming in another environment: {'; '.join(changed)}")
        environment["engine"] = {**before.get("engine", {}), **engine}
    folder.write_json("environment.json", environment)
    folder.write_json("data.json", bench.data.report)
    folder.write_json("modules.json", member.plan.to_json())
    return environment


def _common_steps(sessions: Sequence[Session]) -> list[int | None]:
    """Returns the step that each run of a bundle goes on from, at most; None: its newest.

    A bundle that was killed between two checkpoints goes back to the step that all of them have:
    then it takes the same steps together as if nothing had happened, and ends with the same bits.
    """
    if len(sessions) <= 1:
        return [None] * len(sessions)
    steps = [[0, *sound_steps(session.folder.path / "checkpoints")] for session in sessions]
    ends = [session.run.train.max_steps for session in sessions]
    unfinished = [have[-1] for have, end in zip(steps, ends, strict=True) if have[-1] < end]
    together = min(unfinished, default=max(ends))
    common = [min(together, end) for end in ends]
    if all(step in have for step, have in zip(common, steps, strict=True)):
        return list(common)
    return [None] * len(sessions)


def _restore(session: Session, *, up_to: int | None) -> None:
    """Puts the run and its records back to the newest checkpoint, or to step 0."""
    folder, notice = session.folder, session.bench.screen.notice
    snapshot = load_latest(folder.path / "checkpoints", notice=notice, up_to=up_to)
    if snapshot is not None:
        digest = config_digest(folder.config)
        if snapshot.state["config_digest"] != digest:
            raise RunFolderError(
                f"{folder.path.name}: its checkpoint belongs to another configuration "
                f"({snapshot.state['config_digest']}, not {digest})"
            )
        restore_state(session.run, tensors=snapshot.tensors, state=snapshot.state)
        notice(f"resuming after step {session.run.step} of {session.run.train.max_steps}")
    folder.rewind(session.run.step)


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
