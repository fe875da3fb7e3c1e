"""Forecasts of a run or a study: memory, time, and whether it fits (`loracle plan`, `--plan`)."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from loracle.config.files import find_config, load_config, read_yaml
from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.forecast.cases import PlannedArms, predict_arms
from loracle.forecast.fit import Fit, find_fit
from loracle.forecast.lengths import Lengths, lengths_of
from loracle.forecast.op_costs import Rates
from loracle.forecast.predict import Prediction
from loracle.forecast.target import Target, target_of
from loracle.placement import Inventory, resolve_placement
from loracle.records.files import read_json
from loracle.records.names import ENVIRONMENT, RESULT, run_folder
from loracle.seeds import stream_seed
from loracle.study.config import StrategicConfig
from loracle.study.file import load_study
from loracle.study.plan import PlannedRun, StudyPlan, plan_study
from loracle.study.search import search_runs
from loracle.text import in_words, plural

# assumed, for a device of unknown speed: only the ratios of arms count, finished runs set the scale
_UNKNOWN_SPEED = Rates(flop_per_s=1e11, byte_per_s=2e10, overhead_s=1e-5, overlaps=False)


@dataclass(frozen=True)
class PlanReport:
    """A forecast and its assumptions."""

    arms: PlannedArms
    target: Target
    lengths: Lengths
    predictions: Mapping[str, Prediction]
    fit: Fit | str | None = None
    """Settings that fit, or why none do; None: everything fits as given."""
    is_fitted: bool = False
    """Whether the predictions are those of the settings that fit."""


def make_plan(
    name: str, *, overrides: Sequence[str] = (), gpu: str | None = None, fit: bool = False
) -> PlanReport:
    """Returns the memory and time of a run or a study on a device, without loading weights.

    Args:
        name: A YAML file, or the name of a shipped one.
        overrides: ``key=value`` pairs.
        gpu: A device of the table, or a size of memory; None: this machine's device.
        fit: Predict with the settings that ``--fit`` would choose.

    Raises:
        UsageError: If the configuration is not valid, there is no such device, or nothing fits it.
    """
    arms = planned_arms(name, overrides=overrides)
    target = target_of(gpu, config=arms.config)
    chosen: Fit | str | None = None
    if fit:
        chosen = find_fit(arms, device=target.device, rates=target.rates)
        arms, predictions = replace(arms, config=chosen.config), chosen.predictions
    else:
        predictions = predict_arms(arms, device=target.device, rates=target.rates)
        if not all(prediction.fits for prediction in predictions.values()):
            try:
                chosen = find_fit(arms, device=target.device, rates=target.rates, known=predictions)
            except UsageError as error:
                chosen = str(error)
    return PlanReport(arms, target, lengths_of(arms.config), predictions, chosen, is_fitted=fit)


@dataclass(frozen=True)
class FitChoice:
    """Settings with which all runs fit a device."""

    overrides: tuple[str, ...]
    """The settings as ``--set`` takes them."""
    notes: Mapping[str, Any]
    """The choice as it is recorded with every run."""
    words: str
    """The choice in one line."""


def choose_fit(name: str, *, overrides: Sequence[str] = (), gpu: str | None = None) -> FitChoice:
    """Returns the settings nearest to a configuration's with which all of its runs fit a device.

    A model's profile for the device is tried first, if it has one. Arguments are those of
    `make_plan`.

    Raises:
        UsageError: If nothing fits, or the configuration is not valid.
    """
    arms = planned_arms(name, overrides=overrides)
    target = target_of(gpu, config=arms.config)
    fit = find_fit(arms, device=target.device, rates=target.rates)
    where = f"{target.device.name} ({target.device.memory_gib:.1f} GiB)"
    return FitChoice(
        overrides=fit.overrides,
        notes={
            "fit": {
                "device": target.device.name,
                "memory_gib": round(target.device.memory_gib, 2),
                "changes": dict(fit.changes),
                "predicted_peak_gib": round(fit.peak_gib, 3),
            }
        },
        words=f"fit to {where}: {', '.join(fit.overrides) or 'no setting has to change'}; "
        f"predicted peak at most {fit.peak_gib:.1f} GiB",
    )


def planned_arms(name: str, *, overrides: Sequence[str]) -> PlannedArms:
    """Returns the placements of a run's or a study's configuration; no weights are needed.

    Raises:
        UsageError: If it is not valid, or the model's architecture is not available.
    """
    path = find_config(name)
    if "arms" in read_yaml(path):
        return _arms_of_file(name, title=path.stem, overrides=overrides)
    config = load_config(name, overrides=overrides)
    architecture, inventory = _model(config)
    lora = config.lora
    plan = resolve_placement(lora.placement, inventory=inventory, rank=lora.rank, alpha=lora.alpha)
    plan.require_trainable(quantization=config.quantization)
    return PlannedArms(
        path.stem, config, architecture, {plan.placement: plan}, {plan.placement: 1}, ()
    )


def _model(config: Config) -> tuple[dict[str, Any], Inventory]:
    from loracle.model.guard import require_sealed_architecture
    from loracle.model.inventory import inventory_from_architecture
    from loracle.sources import model_architecture

    architecture = model_architecture(config.model)
    inventory = inventory_from_architecture(architecture)
    require_sealed_architecture(architecture)
    return architecture, inventory


def _arms_of_file(name: str, *, title: str, overrides: Sequence[str]) -> PlannedArms:
    study, base = load_study(name, overrides=overrides)
    architecture, inventory = _model(base)
    strategic = {
        arm: given.placement.strategic
        for arm, given in study.arms.items()
        if isinstance(given.placement, StrategicConfig)
    }
    # Real scores need the weights. The cost of a set of modules depends on its choice only through
    # its lowest layer, so a random set stands in.
    scores: dict[str, Mapping[str, float]] = {
        kind: {
            module.name: float(stream_seed(0, "stand-in", kind, module.name))
            for module in inventory.modules
        }
        for kind in set(strategic.values())
    }
    plan = plan_study(study, base=base, name=title, inventory=inventory, scores=scores)
    return _arms_of_plan(plan, architecture=architecture, stand_ins=tuple(strategic))


def _arms_of_plan(
    plan: StudyPlan, *, architecture: Mapping[str, Any], stand_ins: tuple[str, ...] = ()
) -> PlannedArms:
    return PlannedArms(
        title=plan.name,
        config=plan.base,
        architecture=architecture,
        plans={arm.name: arm.plan for arm in plan.arms},
        num_runs=Counter(run.arm for run in (*search_runs(plan), *plan.runs)),
        stand_ins=stand_ins,
    )


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted time of the runs of a study that are not finished."""

    seconds_by_arm: Mapping[str, float]
    """Seconds of one run of each arm; empty if the device's speed is unknown."""
    arms_left: tuple[str, ...]
    """Arm of each run that is not finished."""
    basis: str
    """What the estimate rests on, in words."""

    @property
    def seconds_left(self) -> float:
        """Seconds of all runs that are not finished, one after another."""
        return sum(self.seconds_by_arm[arm] for arm in self.arms_left)

    def words(self) -> str:
        """Returns the estimate in one line."""
        if not self.arms_left:
            return "nothing left to run"
        if not self.seconds_by_arm:
            return self.basis
        return (
            f"about {in_words(self.seconds_left)} for {plural(len(self.arms_left), 'run')} one "
            f"after another ({self.basis})"
        )


def estimate_time(plan: StudyPlan, *, out: Path) -> TimeEstimate:
    """Returns the predicted time of a study's runs, corrected by the pace of finished ones.

    Times are those of `make_plan`. Where the device's speed is unknown, only finished runs give
    any, and without a finished run nothing is traced.

    Raises:
        UsageError: If the data or the model's architecture are not available.
    """
    elapsed: list[tuple[str, float]] = []
    left = []
    for run in (*search_runs(plan), *plan.runs):
        seconds = _elapsed_s(run, out=out)
        if seconds is None:
            left.append(run.arm)
        else:
            elapsed.append((run.arm, seconds))
    target = target_of(None, config=plan.base)
    if not left or (target.rates is None and not elapsed):
        return TimeEstimate({}, tuple(left), target.basis)
    architecture, _ = _model(plan.base)
    predictions = predict_arms(
        _arms_of_plan(plan, architecture=architecture),
        device=target.device,
        rates=target.rates or _UNKNOWN_SPEED,
        only_times=True,
    )
    traced = {arm: p.times.run_s for arm, p in predictions.items() if p.times}
    if not elapsed:
        return TimeEstimate(traced, tuple(left), f"traced; {target.basis}")
    pace = statistics.median(seconds / traced[arm] for arm, seconds in elapsed)
    basis = f"traced, at the pace of {plural(len(elapsed), 'finished run')}"
    return TimeEstimate({arm: pace * s for arm, s in traced.items()}, tuple(left), basis)


def _elapsed_s(run: PlannedRun, *, out: Path) -> float | None:
    """Returns the seconds from start to result of a finished run; None if it is not finished."""
    folder = run_folder(out, run.id)
    if not (folder / RESULT).is_file():
        return None
    started_at = read_json(folder / ENVIRONMENT)["captured_at"]
    finished_at = read_json(folder / RESULT)["finished_at"]
    elapsed = datetime.fromisoformat(finished_at) - datetime.fromisoformat(started_at)
    return elapsed.total_seconds()
