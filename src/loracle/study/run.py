"""A study: arms x seeds on one base, resumable, each run in its own folder, then the verdicts.

::

    DIR/study.yaml, plan.json, scores.json     what was planned (`loracle.records.study_folder`)
    DIR/runs/<id>/                             one run folder each
    DIR/report/                                what came of it: verdicts.json, index.html, paper.tex

Started again it goes on where it was: finished runs are skipped, a run that was stopped continues
from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.config.files import dump_yaml, read_yaml
from loracle.config.run import Config, changes, flatten
from loracle.errors import RunFolderError
from loracle.placement import Inventory
from loracle.records.files import disk_faults, read_json, write_durably, write_json
from loracle.records.names import PLAN, SCORES, STUDY
from loracle.records.signature import environment_differences
from loracle.runner.progress import Progress
from loracle.runner.run_many import portable_config, run_many
from loracle.runner.run_spec import RunOutcome, RunSpec
from loracle.study.config import StrategicConfig, StudyConfig
from loracle.study.plan import PlannedRun, Scores, StudyPlan, plan_study, resolve_arms
from loracle.study.search import search_runs, with_learning_rates

# What a study that goes on must have in common with what it was, as keys of study.yaml.
_FIXED = ("config", "budget", "reference")


_SCORED_STEPS = 4
"""assumed: scores of modules settle over so many training batches (LOG.md)"""


@dataclass(frozen=True)
class StudyOutcome:
    """How a study ended."""

    plan: StudyPlan
    """With the learning rates that a search found."""
    outcomes: tuple[RunOutcome, ...]
    """Of the runs, in the plan's order."""

    @property
    def failed(self) -> list[RunOutcome]:
        """Runs that did not complete."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]


def prepare_study(
    study: StudyConfig, *, base: Config, name: str, out: Path, progress: Progress | None = None
) -> StudyPlan:
    """Returns the study's plan; modules are scored first if an arm asks for it.

    Args:
        study: Its file.
        base: What all runs share.
        name: Of the study.
        out: Its folder; scores that it has are used.
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
    if chosen_by_score:
        _refuse_early(study, base=base, inventory=inventory, without=chosen_by_score)
        kinds = sorted(set(chosen_by_score.values()))
        scores = module_scores(
            study, base=base, kinds=kinds, out=out, progress=progress or Progress()
        )
    return plan_study(study, base=base, name=name, inventory=inventory, scores=scores)


def _refuse_early(
    study: StudyConfig, *, base: Config, inventory: Inventory, without: Collection[str]
) -> None:
    """Raises what is wrong with the other arms before a weight is loaded to score modules."""
    if study.reference in without:
        return
    others = {name: arm for name, arm in study.arms.items() if name not in without}
    resolve_arms(
        study.model_copy(update={"arms": others}), base=base, inventory=inventory, scores={}
    )


def module_scores(
    study: StudyConfig, *, base: Config, kinds: Sequence[str], out: Path, progress: Progress
) -> Scores:
    """Returns the scores of the modules, from the study's folder if it has them.

    Scored on the first training batches of the study's first seed, never on validation examples.
    """
    known = _known_scores(out)
    if all(kind in known for kind in kinds):
        return known
    from loracle.engine.schedule import DataOrder
    from loracle.model.scores import score_modules
    from loracle.runner.shared_base import open_shared_base
    from loracle.runner.signals import StopRequest

    found = dict(known)
    with StopRequest() as stop:
        shared = open_shared_base(base, progress=progress, stop=stop)
        order = DataOrder(shared.data.train, batch_size=base.train.batch_size, seed=study.seeds[0])
        examples = [example for step in range(_SCORED_STEPS) for example in order.batch(step)]
        with progress.phase("score the modules", total=len(kinds)) as advance:
            for kind in kinds:
                found[kind] = score_modules(
                    shared.base,
                    examples,
                    score=kind,
                    seed=study.seeds[0],
                    rank=base.lora.rank,
                    batch_size=base.train.batch_size,
                    micro_batch_tokens=base.train.micro_batch_tokens,
                )
                advance(1, detail=kind)
                stop.check()
    return found


def _known_scores(out: Path) -> dict[str, Mapping[str, float]]:
    return dict(read_json(out / SCORES)["scores"]) if (out / SCORES).is_file() else {}


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
    """Returns how the study's runs ended; those that had completed are skipped.

    Args:
        plan: The study.
        out: Its folder.
        progress: Defaults to standard error.
        bundle_size: Runs that train together; None: as many as the device gains from.
        ended: Takes the outcomes of runs as they end.
        decided: Takes the plan when its learning rates are known.
        notes: Recorded with every run, in the section ``engine`` of environment.json.

    Raises:
        RunFolderError: If the folder holds another study, or runs of another environment.
        UsageError: If something else cannot be used.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint of every run in progress.
    """
    progress = progress or Progress()
    keep_plan(plan, out=out)
    trials = search_runs(plan)
    settings: dict[str, Any] = {
        "notes": notes or {},
        "progress": progress,
        "bundle_size": bundle_size,
        "ended": ended,
    }
    if trials:
        tried = _run(trials, out=out, **settings)
        plan = with_learning_rates(plan, best_rates(trials, tried))
        keep_plan(plan, out=out)
    decided(plan)
    outcomes = _run(plan.runs, out=out, **settings)
    return StudyOutcome(plan, tuple(outcomes))


def _run(
    runs: Sequence[PlannedRun], *, out: Path, notes: Mapping[str, Any], **settings: Any
) -> list[RunOutcome]:
    specs = [RunSpec(run.config, out / "runs" / run.id, arm=run.arm, notes=notes) for run in runs]
    require_one_environment(specs)
    return run_many(specs, **settings)


def keep_plan(plan: StudyPlan, *, out: Path) -> None:
    """Writes the plan into the study's folder.

    Seeds and arms may have been added or taken away since; runs that are no longer planned stay
    where they are and are not counted.

    Raises:
        RunFolderError: If the folder holds another study or anything else, or cannot be written.
    """
    study = plan.study_json()
    if (out / STUDY).is_file():
        _require_same_study(read_yaml(out / STUDY), study, out=out)
    elif out.is_dir() and any(out.iterdir()):
        raise RunFolderError(f"{out}: holds something that is not a study; give another --out")
    with disk_faults(out):
        out.mkdir(parents=True, exist_ok=True)
        write_durably(out / STUDY, dump_yaml(study).encode())
        trials = [run.to_json() for run in search_runs(plan)]
        write_json(out / PLAN, plan.plan_json() | {"search": trials})
        if plan.scores:
            scored = {"schema": 1, "steps": _SCORED_STEPS, "scores": dict(plan.scores)}
            write_json(out / SCORES, scored)


def _require_same_study(before: Mapping[str, Any], now: Mapping[str, Any], *, out: Path) -> None:
    ours, theirs = (flatten({key: each.get(key) for key in _FIXED}) for each in (before, now))
    free = ("config.checkpoint.", "config.tracking.", "config.measure.clock_rounds")
    changed = [line for line in changes(ours, theirs) if not line.startswith(free)]
    if changed:
        raise RunFolderError(
            f"{out}: holds another study ({'; '.join(changed[:5])}); give another --out"
        )


def require_one_environment(specs: Sequence[RunSpec]) -> None:
    """Checks that the runs that are finished were measured where the others are about to be.

    Raises:
        RunFolderError: If one was not, naming what differs.
    """
    from loracle.engine.device import choose_device, choose_dtype, dtype_name, faster_fp32
    from loracle.engine.environment import capture_environment

    finished = [spec for spec in specs if (spec.out / "result.json").is_file()]
    if not finished or len(finished) == len(specs):
        return
    config = specs[0].config
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device)
    # As the runs see it: how fp32 is multiplied is one of the things that must agree.
    with faster_fp32(device, dtype):
        here = capture_environment(
            device=str(device), dtype=dtype_name(dtype), quantization=config.quantization
        )
    for spec in finished:
        changed = environment_differences(read_json(spec.out / "environment.json"), here)
        if changed:
            raise RunFolderError(
                f"{spec.out.name}: was measured in another environment "
                f"({'; '.join(changed[:5])}); unlike environments do not share a table: go on "
                "where it was measured, or give another --out"
            )


def best_rates(trials: Sequence[PlannedRun], outcomes: Sequence[RunOutcome]) -> dict[str, float]:
    """Returns the learning rate of each arm with the lowest validation loss."""
    found: dict[str, tuple[float, float]] = {}
    for trial, outcome in zip(trials, outcomes, strict=True):
        if outcome.result is None:
            continue
        loss = outcome.result.quality.tuned.loss_nats_per_token
        rate = trial.config.train.learning_rate
        found[trial.arm] = min(found.get(trial.arm, (loss, rate)), (loss, rate))
    return {arm: rate for arm, (_, rate) in found.items()}
