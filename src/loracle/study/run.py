"""Runs a study: arms x seeds on one base, each run in its own folder, resumable.

::

    DIR/study.yaml, plan.json, scores.json     what was planned (`loracle.records.study_folder`)
    DIR/runs/<id>/                             one run folder each
    DIR/report/                                verdicts.json, index.html, paper.tex

A second start resumes: finished runs are skipped, a stopped run continues from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loracle.analysis.rate_search import best_rates
from loracle.config.files import read_yaml
from loracle.config.run import Config, changes, flatten
from loracle.errors import RunFolderError
from loracle.placement import Inventory
from loracle.records.files import read_json
from loracle.records.manifest import require_intact
from loracle.records.names import (
    ENVIRONMENT,
    MANIFEST,
    REPORT,
    RESULT,
    STUDY,
    STUDY_RECORDS,
    run_folder,
)
from loracle.records.run_state import REMEDY
from loracle.records.signature import environment_differences
from loracle.records.study_folder import drop_damaged, write_plan
from loracle.runner.place import PATHS_FROM, portable_config, recorded_start
from loracle.runner.progress import Progress
from loracle.runner.run_many import run_many
from loracle.runner.run_spec import RunOutcome, RunSpec
from loracle.study.config import StrategicConfig, StudyConfig
from loracle.study.plan import PlannedRun, Scores, StudyPlan, plan_study, resolve_arms
from loracle.study.scoring import SCORED_STEPS, module_scores
from loracle.study.search import search_runs, with_learning_rates

# Keys of study.yaml that must not change when a study is resumed.
_FIXED = ("config", "budget", "reference")


@dataclass(frozen=True)
class StudyOutcome:
    """Outcome of a study."""

    plan: StudyPlan
    """The plan with the learning rates of the search."""
    outcomes: tuple[RunOutcome, ...]
    """Outcomes of the runs, in the plan's order."""

    @property
    def failed(self) -> list[RunOutcome]:
        """Runs that did not complete."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]


def prepare_study(
    study: StudyConfig, *, base: Config, name: str, out: Path, progress: Progress | None = None
) -> StudyPlan:
    """Returns the study's plan; modules are scored first if an arm asks for it.

    Args:
        study: The study's configuration.
        base: The configuration that all runs share.
        name: Name of the study.
        out: The study's folder; scores in it are reused.
        progress: Defaults to standard error.

    Raises:
        UsageError: If a source, a placement or a budget cannot be used.
    """
    from loracle.model.inventory import inventory_from_architecture
    from loracle.sources import model_architecture

    base = portable_config(base)
    inventory = inventory_from_architecture(model_architecture(base.model))
    chosen_by_score = {
        name: arm.placement.strategic
        for name, arm in study.arms.items()
        if isinstance(arm.placement, StrategicConfig)
    }
    scores: Scores = {}
    key = None
    if chosen_by_score:
        _refuse_early(study, base=base, inventory=inventory, without=chosen_by_score)
        kinds = sorted(set(chosen_by_score.values()))
        scores, key = module_scores(
            study, base=base, kinds=kinds, out=out, progress=progress or Progress()
        )
    plan = plan_study(study, base=base, name=name, inventory=inventory, scores=scores)
    return replace(plan, scores_key=key)


def _refuse_early(
    study: StudyConfig, *, base: Config, inventory: Inventory, without: Collection[str]
) -> None:
    """Raises the errors of the other arms before weights are loaded to score modules."""
    if study.reference in without:
        return
    others = {name: arm for name, arm in study.arms.items() if name not in without}
    resolve_arms(
        study.model_copy(update={"arms": others}), base=base, inventory=inventory, scores={}
    )


def run_study(
    plan: StudyPlan,
    *,
    out: Path,
    progress: Progress | None = None,
    bundle_size: int | None = None,
    ended: Callable[[Sequence[RunOutcome]], None] = lambda _: None,
    decided: Callable[[StudyPlan], None] = lambda _: None,
    notes: Mapping[str, Any] | None = None,
) -> StudyOutcome:
    """Runs a study and returns its outcome; completed runs are skipped.

    Args:
        plan: The study.
        out: Its folder.
        progress: Defaults to standard error.
        bundle_size: Runs that train together; None: chosen by measurement.
        ended: Called with the outcomes of runs as they end.
        decided: Called with the plan when its learning rates are known.
        notes: Recorded with every run, under ``engine`` in environment.json.

    Raises:
        RunFolderError: If the folder holds another study, or runs of another environment.
        UsageError: If something else cannot be used.
        Interrupted: On SIGINT, SIGTERM or SIGHUP, after a checkpoint of every run in progress.
    """
    progress = progress or Progress()
    keep_plan(plan, out=out, progress=progress)
    trials = search_runs(plan)
    settings: dict[str, Any] = {
        "notes": notes or {},
        "progress": progress,
        "bundle_size": bundle_size,
        "ended": ended,
    }
    if trials:
        outcomes = _run(trials, out=out, **settings)
        rates = best_rates(
            (
                trial.arm,
                trial.config.train.learning_rate,
                outcome.result.quality.tuned.loss_nats_per_token,
            )
            for trial, outcome in zip(trials, outcomes, strict=True)
            if outcome.result is not None
        )
        plan = with_learning_rates(plan, rates)
        keep_plan(plan, out=out, progress=progress)
    decided(plan)
    outcomes = _run(plan.runs, out=out, beside=trials, **settings)
    return StudyOutcome(plan, tuple(outcomes))


def _run(
    runs: Sequence[PlannedRun],
    *,
    out: Path,
    notes: Mapping[str, Any],
    beside: Sequence[PlannedRun] = (),
    **settings: Any,
) -> list[RunOutcome]:
    """Does the runs; ``beside`` are those done before them that share their base and data."""
    done = [path for run in beside if ((path := run_folder(out, run.id)) / RESULT).is_file()]
    specs = [
        RunSpec(run.config, run_folder(out, run.id), arm=run.arm, notes=notes, beside=done)
        for run in runs
    ]
    require_one_environment(specs)
    return run_many(specs, **settings)


def keep_plan(plan: StudyPlan, *, out: Path, progress: Progress | None = None) -> None:
    """Writes the plan into the study's folder.

    Seeds and arms may have been added or removed since the last start; runs that are no longer
    planned stay in the folder and are not counted. Damaged records are told to ``progress``, by
    default standard error, and made anew.

    Raises:
        RunFolderError: If the folder holds another study or anything else, or cannot be written.
    """
    study = plan.study_json() | {PATHS_FROM: recorded_start(out)}
    damaged = drop_damaged(out)
    for line in damaged.values():
        (progress or Progress()).notice(line)
    if (out / STUDY).is_file():
        before = {} if STUDY in damaged else read_yaml(out / STUDY)
        # Empty if damaged: then only the runs' own configurations are compared.
        if before:
            _require_same_study(before, study, out=out)
    elif out.is_dir() and _foreign(out):
        raise RunFolderError(f"{out}: holds something that is not a study; give another --out")
    trials = [run.to_json() for run in search_runs(plan)]
    scored = {
        "schema": 1,
        "key": plan.scores_key,
        "steps": SCORED_STEPS,
        "scores": dict(plan.scores),
    }
    write_plan(
        out,
        study=study,
        plan=plan.plan_json() | {"search": trials},
        scores=scored if plan.scores else None,
    )


def _foreign(out: Path) -> bool:
    """Returns whether a folder without a study's configuration holds what no study wrote."""
    ours = (*STUDY_RECORDS, MANIFEST, "runs", REPORT)
    names = (path.name for path in out.iterdir())
    return any(name not in ours and not name.endswith(".tmp") for name in names)


def _require_same_study(before: Mapping[str, Any], now: Mapping[str, Any], *, out: Path) -> None:
    recorded, new = (flatten({key: study.get(key) for key in _FIXED}) for study in (before, now))
    free = ("config.checkpoint.", "config.tracking.", "config.measure.clock_rounds")
    changed = [line for line in changes(recorded, new) if not line.startswith(free)]
    if changed:
        raise RunFolderError(
            f"{out}: holds another study ({'; '.join(changed[:5])}); give another --out"
        )


def require_one_environment(specs: Sequence[RunSpec]) -> None:
    """Checks that finished runs were measured in the environment of the remaining ones.

    Raises:
        RunFolderError: Naming the differences, if one was not.
    """
    from loracle.engine.determinism import determinism
    from loracle.engine.device import choose_device, choose_dtype, dtype_name, faster_fp32
    from loracle.engine.environment import capture_environment

    finished = [spec for spec in specs if (spec.out / RESULT).is_file()]
    for spec in finished:
        require_intact(spec.out, remedy=REMEDY)
    if not finished or len(finished) == len(specs):
        return
    config = specs[0].config
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device)
    # How products are made is part of the environment, as it is for the runs.
    with faster_fp32(device, dtype), determinism(device, requested=config.deterministic):
        here = capture_environment(
            device=str(device), dtype=dtype_name(dtype), quantization=config.quantization
        )
    for spec in finished:
        changed = environment_differences(read_json(spec.out / ENVIRONMENT), here)
        if changed:
            raise RunFolderError(
                f"{spec.out.name}: was measured in another environment "
                f"({'; '.join(changed[:5])}); results of different environments are not mixed: "
                "continue where it was measured, or give another --out"
            )
