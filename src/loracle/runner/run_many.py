"""Many runs on one base: loaded once, scored once, trained in bundles, each in its own folder.

What is done is skipped, what was stopped goes on from its checkpoint, and a run that fails is
recorded as failed while the others go on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loracle.config.run import Config, flatten
from loracle.engine.device import (
    choose_device,
    choose_dtype,
    dtype_name,
    faster_fp32,
    keep_large_blocks,
)
from loracle.errors import Interrupted, LoracleError, UsageError
from loracle.records.files import disk_faults
from loracle.records.result import RunResult, read_result
from loracle.records.run_folder import RunFolder, recorded_config
from loracle.runner.active_run import record_failure
from loracle.runner.bundle import run_bundle
from loracle.runner.bundle_size import BundleChoice, group_runs
from loracle.runner.outcome import RunOutcome
from loracle.runner.preflight import preflight
from loracle.runner.prepare import Member, enlist
from loracle.runner.probe import Prober, smoke
from loracle.runner.progress import Screen
from loracle.runner.shared_base import Workbench, open_workbench
from loracle.runner.signals import StopRequest
from loracle.runner.untuned import know_untuned
from loracle.sources.spec import portable

_ALONE = BundleChoice(1, "full fine-tuning trains alone")


# What runs on one base share, as keys or sections of the configuration.
_SHARED = ("model", "dtype", "quantization", "device", "data", "eval", "measure")


@dataclass(frozen=True)
class RunSpec:
    """A run to be done."""

    config: Config
    """The resolved configuration."""
    out: Path
    """Its folder."""
    arm: str | None = None
    """What its results call its placement; None: the placement's label."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What to record about how it came to be, in the section ``engine`` of environment.json."""


Ended = Callable[[Sequence[RunOutcome]], None]
"""Takes the outcomes of runs as they end."""


def _say_nothing(_outcomes: Sequence[RunOutcome]) -> None:
    """Takes the outcomes of runs and drops them."""


def run_many(
    specs: Sequence[RunSpec],
    *,
    resume: bool = True,
    screen: Screen | None = None,
    bundle_size: int | None = None,
    ended: Ended = _say_nothing,
) -> list[RunOutcome]:
    """Returns how each run ended, in the order given.

    Args:
        specs: The runs; they agree on model, dtype, device, data, evaluation and measurement.
        resume: Skip runs that completed and go on with those that did not; False: every folder
            must be new.
        screen: Where progress is shown; None: standard error.
        bundle_size: Runs that train together; None: as many as the device gains from.
        ended: Takes the outcomes of each bundle when it has ended.

    Raises:
        UsageError: If something the user or a file gave cannot be used; nothing is left behind.
        RunFailed: If the untuned model cannot be evaluated.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint of every run in progress.
    """
    screen = screen or Screen()
    specs = [replace(spec, config=portable_config(spec.config)) for spec in specs]
    require_agreement(specs, bundle_size=bundle_size)
    keep_large_blocks()
    with ExitStack() as opened, StopRequest() as stop:
        folders = [opened.enter_context(_open_folder(spec, resume=resume)) for spec in specs]
        outcomes = {
            folder.path: RunOutcome(folder.path, read_result(folder.path), skipped=True)
            for folder in folders
            if folder.is_finished
        }
        if len(outcomes) < len(folders):
            config = next(folder for folder in folders if not folder.is_finished).config
            with _recording(folders, outcomes), _fp32_of(config):
                _run(
                    folders,
                    outcomes,
                    specs={spec.out: spec for spec in specs},
                    screen=screen,
                    stop=stop,
                    bundle_size=bundle_size,
                    ended=ended,
                )
    return [outcomes[spec.out] for spec in specs]


def _fp32_of(config: Config) -> AbstractContextManager[str]:
    device = choose_device(config.device)
    return faster_fp32(device, choose_dtype(config.dtype, device=device))


def require_agreement(specs: Sequence[RunSpec], *, bundle_size: int | None = None) -> None:
    """Checks that the runs can share one base and its evaluation.

    Raises:
        UsageError: If they differ in what runs on one base share, or in nothing but the folder's
            name that they would both write to.
    """
    if not specs:
        raise UsageError("no runs were given")
    if bundle_size is not None and bundle_size < 1:
        raise UsageError(f"bundle_size: must be at least 1, got {bundle_size}")
    places = [spec.out.absolute() for spec in specs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice.name}: two runs cannot share a folder; give each its own")
    first, *others = [_shared(spec.config) for spec in specs]
    for other, spec in zip(others, specs[1:], strict=True):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UsageError(
                    f"{key}: {first.get(key)!r} in {specs[0].out.name}, {other.get(key)!r} in "
                    f"{spec.out.name}; runs on one base must agree on it"
                )


def _shared(config: Config) -> dict[str, object]:
    return flatten(config.model_dump(mode="json", include=set(_SHARED)))


def _run(
    folders: Sequence[RunFolder],
    outcomes: dict[Path, RunOutcome],
    *,
    specs: Mapping[Path, RunSpec],
    screen: Screen,
    stop: StopRequest,
    bundle_size: int | None,
    ended: Ended,
) -> None:
    """Does the runs of these folders that are not finished, bundle by bundle."""
    for folder in folders:
        if not folder.is_finished:
            folder.set_status("running", phase="prepare")
    preflight(folders[0].config)
    bench = open_workbench(folders[0].config, screen=screen, stop=stop)
    members = enlist(
        bench,
        folders,
        arms={path: spec.arm for path, spec in specs.items()},
        notes={path: spec.notes for path, spec in specs.items()},
    )
    _smoke_test(bench, members)
    prober = Prober(bench)
    adapted = [member for member in members if not member.plan.is_full]
    choice = prober.choose_size(adapted, asked=bundle_size) if adapted else _ALONE
    _say(bench, members, choice=choice)
    # Full fine-tuning comes last: it takes the base that all others share.
    whole = [[member] for member in members if member.plan.is_full]
    bundles = bundles_of(adapted, size=choice.size) + whole
    for number, bundle in enumerate(bundles, 1):
        waiting = [member for member in bundle if not member.folder.is_finished]
        if not waiting:
            continue
        stop.check()
        if waiting[0].plan.is_full:
            know_untuned(bench)
            bench.thaw()
        if len(members) > 1:
            names = ", ".join(member.folder.path.name for member in waiting)
            screen.notice(f"bundle {number} of {len(bundles)}: {names}")
        # Also of a bundle of which one run is left: the others shared the steps it took.
        shared = len(bundle) > 1 or (len(members) > 1 and bundle[0].folder.failed_before)
        alone = waiting[0].plan.is_full or not shared
        found = run_bundle(
            bench,
            waiting,
            choice=_ALONE if waiting[0].plan.is_full else choice,
            isolated=None if alone else prober.measure,
        )
        outcomes |= {outcome.out: outcome for outcome in found}
        for outcome in found:
            if outcome.error is not None and len(members) > 1:
                screen.notice(f"{outcome.out.name}: failed, the others go on: {outcome.error}")
        ended(found)


def _smoke_test(bench: Workbench, members: Sequence[Member]) -> None:
    """Tries everything once where runs are long and memory is short; not when going on."""
    new = [one for one in members if not (one.folder.path / "checkpoints").exists()]
    adapted = [member for member in new if not member.plan.is_full]
    if bench.base.device.type == "cuda" and adapted and len(new) == len(members):
        smoke(bench, config=adapted[0].config, plan=adapted[0].plan)


def bundles_of(members: Sequence[Member], *, size: int) -> list[list[Member]]:
    """Returns the runs that train together, finished ones included.

    Who trains with whom must not depend on who is finished, or a study that was stopped would end
    with other bits. A run that failed before is tried again alone, after the others.
    """
    sound = [member for member in members if not member.folder.failed_before]
    groups = group_runs([member.lowest_layer for member in sound], size=size)
    failed = [[member] for member in members if member.folder.failed_before]
    return [[sound[index] for index in group] for group in groups] + failed


def _say(bench: Workbench, members: Sequence[Member], *, choice: BundleChoice) -> None:
    """Shows in one line what is about to be done."""
    config, base = bench.config, bench.base
    plan = members[0].plan
    what = (
        f"{plan.placement}, {plan.trainable_params:,} of {plan.base_params:,} parameters train"
        if len(members) == 1
        else f"{len(members)} runs in bundles of {choice.size} ({choice.reason})"
    )
    bench.screen.notice(
        f"{config.model} on {config.data.source}: {what}; {len(bench.data.train)} training and "
        f"{len(bench.data.validation)} validation examples; {dtype_name(base.dtype)} on "
        f"{base.device}"
    )


def portable_config(config: Config) -> Config:
    """Returns the config with local sources spelled without this machine's folders."""
    data = config.data.model_copy(update={"source": portable(config.data.source)})
    return config.model_copy(update={"model": portable(config.model), "data": data})


@contextmanager
def _open_folder(spec: RunSpec, *, resume: bool) -> Iterator[RunFolder]:
    """Opens a run folder; one that is new and never got to train is taken away again."""
    out = spec.out
    with disk_faults(out):
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    going_on = resume and (out / "config.yaml").exists()
    open_ = RunFolder.reopen if going_on else RunFolder.create
    try:
        opened = open_(out, config=spec.config)
    except UsageError as error:
        # Refused by the disk half-way; a folder that is held or was there before is not ours.
        if isinstance(error.__cause__, OSError) and out in missing:
            _take_away(out, missing=missing)
        raise
    with opened as folder:
        try:
            yield folder
        except UsageError:
            if not going_on and not (out / "modules.json").exists():
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
def _recording(folders: Sequence[RunFolder], outcomes: Mapping[Path, RunOutcome]) -> Iterator[None]:
    """Leaves the reason in the folder of every run that an error or a signal keeps from its end."""
    try:
        yield
    except LoracleError as error:
        for folder in folders:
            if folder.path in outcomes or folder.status.get("status") != "running":
                continue
            if isinstance(error, Interrupted):
                folder.set_status("interrupted", error=str(error))
            else:
                record_failure(folder, error)
        raise


def run_baseline(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    screen: Screen | None = None,
    notes: Mapping[str, Any] | None = None,
) -> RunResult:
    """Returns the result of one run.

    Args:
        config: The resolved configuration.
        out: The run folder; created, or continued with ``resume``.
        resume: Continue the run in ``out``; a finished one is only read.
        screen: Where progress is shown; None: standard error.
        notes: Recorded in the section ``engine`` of environment.json.

    Raises:
        UsageError: If something the user or a file gave cannot be used; nothing is left behind.
        RunFailed: If the run cannot go on or fails its audit; the folder says why.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint.
    """
    if resume:
        # There must be a run to go on with.
        recorded_config(out)
    spec = RunSpec(config, out, notes=notes or {})
    (outcome,) = run_many([spec], resume=resume, screen=screen)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return outcome.result
