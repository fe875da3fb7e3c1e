"""Many runs on one base: loaded once, scored once, trained in bundles, each in its own folder.

Finished runs are skipped, stopped ones continue from their checkpoint, and a run that fails is
recorded as failed while the others continue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracle.config.run import Config, flatten
from loracle.engine.determinism import determinism
from loracle.engine.device import (
    choose_device,
    choose_dtype,
    dtype_name,
    faster_fp32,
    keep_large_blocks,
)
from loracle.engine.measure import imports_set_aside
from loracle.errors import UsageError
from loracle.forecast.time_shares import shares_of_tokens
from loracle.records.result import RunResult, read_result
from loracle.records.run_folder import RunFolder
from loracle.records.run_state import recorded_config
from loracle.runner.bundle import run_bundle
from loracle.runner.bundle_size import BundleChoice, group_runs
from loracle.runner.folders import open_folder, recording
from loracle.runner.place import absolute_config, place_of, portable_config
from loracle.runner.preflight import preflight
from loracle.runner.prepare import PreparedRun, prepare_runs
from loracle.runner.probe import Prober, smoke_test
from loracle.runner.progress import Progress
from loracle.runner.run_spec import RunOutcome, RunSpec
from loracle.runner.shared_base import SharedBase, open_shared_base
from loracle.runner.signals import StopRequest
from loracle.runner.untuned import ensure_untuned

_ALONE = BundleChoice(1, "full fine-tuning trains alone")

# Keys and sections of the configuration that runs on one base must agree on.
_SHARED = (
    "model", "dtype", "quantization", "device", "deterministic", "data", "eval", "measure",
)  # fmt: skip

Ended = Callable[[Sequence[RunOutcome]], None]
"""Called with the outcomes of runs as they end."""


def run_many(
    specs: Sequence[RunSpec],
    *,
    resume: bool = True,
    progress: Progress | None = None,
    bundle_size: int | None = None,
    ended: Ended = lambda _: None,
) -> list[RunOutcome]:
    """Does the runs, and returns how each ended, in the order given.

    Args:
        specs: The runs; they agree on model, dtype, device, data, evaluation and measurement.
        resume: Skip completed runs and continue the others; False requires new folders.
        progress: Defaults to standard error.
        bundle_size: Runs that train together; None chooses as many as the device gains from.
        ended: Called with the outcomes of each bundle when it has ended.

    Raises:
        UsageError: If something the user or a file gave cannot be used; nothing is left behind.
        RunFailed: If the untuned model cannot be evaluated.
        Interrupted: On SIGINT, SIGTERM or SIGHUP, after a checkpoint of every run in progress.
    """
    specs = [replace(spec, config=portable_config(spec.config)) for spec in specs]
    require_agreement(specs, bundle_size=bundle_size)
    keep_large_blocks()
    with ExitStack() as opened, StopRequest() as stop:
        folders = [opened.enter_context(open_folder(spec, resume=resume)) for spec in specs]
        outcomes = {
            folder.path: RunOutcome(folder.path, read_result(folder.path))
            for folder in folders
            if folder.is_finished
        }
        if len(outcomes) < len(folders):
            config = next(folder.config for folder in folders if not folder.is_finished)
            device = choose_device(config.device)
            dtype = choose_dtype(config.dtype, device=device)
            with (
                recording(folders, outcomes),
                faster_fp32(device, dtype),
                determinism(device, requested=config.deterministic),
                imports_set_aside(),
            ):
                _run(
                    specs,
                    folders=folders,
                    outcomes=outcomes,
                    progress=progress or Progress(),
                    stop=stop,
                    bundle_size=bundle_size,
                    ended=ended,
                )
    return [outcomes[spec.out] for spec in specs]


def require_agreement(specs: Sequence[RunSpec], *, bundle_size: int | None = None) -> None:
    """Checks that the runs can share one base and its evaluation.

    Raises:
        UsageError: If they differ in what runs on one base share, or two write to one folder.
    """
    if not specs:
        raise UsageError("no runs were given")
    if bundle_size is not None and bundle_size < 1:
        raise UsageError(f"bundle_size: must be at least 1, got {bundle_size}")
    places = [spec.out.absolute() for spec in specs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice.name}: two runs cannot share a folder; give each its own")
    first, *others = [
        flatten(spec.config.model_dump(mode="json", include=set(_SHARED))) for spec in specs
    ]
    for other, spec in zip(others, specs[1:], strict=True):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise UsageError(
                    f"{key}: {first.get(key)!r} in {specs[0].out.name}, {other.get(key)!r} in "
                    f"{spec.out.name}; runs on one base must agree on it"
                )


def _run(
    specs: Sequence[RunSpec],
    *,
    folders: Sequence[RunFolder],
    outcomes: dict[Path, RunOutcome],
    progress: Progress,
    stop: StopRequest,
    bundle_size: int | None,
    ended: Ended,
) -> None:
    """Does the runs that are not finished, bundle by bundle, and adds their outcomes."""
    for folder in folders:
        if not folder.is_finished:
            folder.set_status("running", phase="prepare")
    preflight(folders[0].config)
    shared = open_shared_base(folders[0].config, progress=progress, stop=stop)
    runs = prepare_runs(shared, specs, folders=folders)
    _smoke_test(shared, runs)
    prober = Prober(shared)
    adapted = [run for run in runs if not run.plan.is_full]
    choice = prober.choose_size(adapted, requested=bundle_size) if adapted else _ALONE
    _announce(shared, runs, choice=choice)
    # Full fine-tuning comes last: it takes the base that all others share.
    full = [[run] for run in runs if run.plan.is_full]
    bundles = bundles_of(adapted, size=choice.size) + full
    for number, bundle in enumerate(bundles, 1):
        waiting = [run for run in bundle if not run.folder.is_finished]
        if not waiting:
            continue
        stop.check()
        is_full = waiting[0].plan.is_full
        if is_full:
            ensure_untuned(shared)
            shared.thaw()
        if len(runs) > 1:
            names = ", ".join(run.name for run in waiting)
            progress.notice(f"bundle {number} of {len(bundles)}: {names}")
        # Also of a bundle of which one run is left: the others shared the steps it took.
        shares = len(bundle) > 1 or (len(runs) > 1 and bundle[0].folder.failed_before)
        results = run_bundle(
            shared,
            waiting,
            choice=_ALONE if is_full else choice,
            probe=prober.measure if shares and not is_full else None,
        )
        outcomes |= {outcome.out: outcome for outcome in results}
        for outcome in results:
            if outcome.error is not None and len(runs) > 1:
                progress.notice(
                    f"{outcome.out.name}: failed; the other runs continue: {outcome.error}"
                )
        ended(results)


def _smoke_test(shared: SharedBase, runs: Sequence[PreparedRun]) -> None:
    """Tries everything once where runs are long and memory is short; not on resuming."""
    is_new = not any(run.folder.checkpoints.exists() for run in runs)
    adapted = [run for run in runs if not run.plan.is_full]
    if shared.base.device.type == "cuda" and adapted and is_new:
        smoke_test(shared, config=adapted[0].config, plan=adapted[0].plan)


def bundles_of(runs: Sequence[PreparedRun], *, size: int) -> list[list[PreparedRun]]:
    """Returns the runs that train together, finished ones included.

    Which runs share a bundle must not depend on which are finished, or a study that was stopped
    would end with other bits. A run that failed before is tried again alone, after the others.
    """
    sound = [run for run in runs if not run.folder.failed_before]
    groups = group_runs([run.lowest_layer for run in sound], size=size)
    failed = [[run] for run in runs if run.folder.failed_before]
    return [[sound[index] for index in group] for group in groups] + failed


def _announce(shared: SharedBase, runs: Sequence[PreparedRun], *, choice: BundleChoice) -> None:
    """Shows in one line what is about to be done."""
    config, base = shared.config, shared.base
    plan = runs[0].plan
    what = (
        f"{plan.placement}, {plan.trainable_params:,} of {plan.base_params:,} parameters train"
        if len(runs) == 1
        else f"{len(runs)} runs in bundles of {choice.size} ({choice.reason})"
    )
    shared.progress.notice(
        f"{config.model} on {config.data.source}: {what}; {len(shared.data.train)} training and "
        f"{len(shared.data.validation)} validation examples; {dtype_name(base.dtype)} on "
        f"{base.device}"
    )
    shares = shares_of_tokens(config, num_scored=len(shared.scored))
    if shares.suggested_examples() is not None:
        shared.progress.notice(f"as counted in passes over examples, {shares.words()}")


def run_baseline(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
) -> RunResult:
    """Runs one configuration and returns its result.

    Args:
        config: The resolved configuration.
        out: The run folder; created, or continued with ``resume``.
        resume: Continue the run in ``out``; a finished one is only read.
        progress: Defaults to standard error.
        notes: As in `RunSpec`.

    Raises:
        UsageError: If something the user or a file gave cannot be used; nothing is left behind.
        RunFailed: If the run fails, or its audit does; the folder says why.
        Interrupted: On SIGINT, SIGTERM or SIGHUP, after a checkpoint.
    """
    if resume:
        recorded_config(out)  # Raises if there is no run to resume.
    spec = RunSpec(absolute_config(config), out, notes=notes or {})
    with place_of(out):
        (outcome,) = run_many([spec], resume=resume, progress=progress)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return outcome.result
