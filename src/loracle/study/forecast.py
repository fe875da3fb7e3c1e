"""`loracle plan`: from a configuration to what it takes and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loracle.config.files import find_config, load_config, read_yaml
from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.forecast.cases import PlannedArms, predict_arms
from loracle.forecast.fit import Fit, find_fit
from loracle.forecast.lengths import Lengths, lengths_of
from loracle.forecast.predict import Prediction
from loracle.forecast.target import Target, target_of
from loracle.placement import Inventory, resolve_placement
from loracle.seeds import stream_seed


def make_plan(
    name: str, *, overrides: Sequence[str] = (), gpu: str | None = None, fit: bool = False
) -> PlanReport:
    """Returns what a run or a study takes on a device; nothing is loaded and nothing is run.

    Args:
        name: A YAML file, or the name of a shipped one.
        overrides: ``key=value`` each.
        gpu: A device of the table, or a size of memory; None: this machine's.
        fit: Plan with the settings that ``--fit`` would choose.

    Raises:
        UsageError: If the configuration is not valid, there is no such device, or nothing fits it.
    """
    arms = planned_arms(name, overrides=overrides)
    target = target_of(gpu, config=arms.config)
    if fit:
        chosen = find_fit(arms, device=target.device, rates=target.rates)
        return PlanReport(
            arms=replace(arms, config=chosen.config),
            target=target,
            lengths=lengths_of(chosen.config),
            predictions=chosen.predictions,
            fit=chosen,
            is_fitted=True,
        )
    found = predict_arms(arms, device=target.device, rates=target.rates)
    return PlanReport(
        arms=arms,
        target=target,
        lengths=lengths_of(arms.config),
        predictions=found,
        fit=None if all(each.fits for each in found.values()) else _fit(arms, target, found),
    )


@dataclass(frozen=True)
class FitChoice:
    """Settings that were chosen so that everything fits."""

    overrides: tuple[str, ...]
    """As ``--set`` takes them."""
    notes: Mapping[str, Any]
    """What is recorded of the choice with every run."""
    words: str
    """The choice in a line."""


def choose_fit(name: str, *, overrides: Sequence[str] = (), gpu: str | None = None) -> FitChoice:
    """Returns the settings nearest to a configuration's with which all of its runs fit a device.

    A model's profile for the device is tried first, if it has one.

    Args:
        name: A YAML file, or the name of a shipped one.
        overrides: ``key=value`` each.
        gpu: A device of the table, or a size of memory; None: this machine's.

    Raises:
        UsageError: If nothing fits, or the configuration is not valid.
    """
    arms = planned_arms(name, overrides=overrides)
    target = target_of(gpu, config=arms.config)
    found = find_fit(arms, device=target.device, rates=target.rates)
    where = f"{target.device.name} ({target.device.memory_gib:.1f} GiB)"
    return FitChoice(
        overrides=found.overrides,
        notes={
            "fit": {
                "device": target.device.name,
                "memory_gib": round(target.device.memory_gib, 2),
                "changes": dict(found.changes),
                "predicted_peak_gib": round(found.peak_gib, 3),
            }
        },
        words=f"fit to {where}: {', '.join(found.overrides) or 'nothing has to change'}; at most "
        f"{found.peak_gib:.1f} GiB predicted",
    )


def _fit(arms: PlannedArms, target: Target, found: Mapping[str, Prediction]) -> Fit | str:
    try:
        return find_fit(arms, device=target.device, rates=target.rates, known=found)
    except UsageError as error:
        return str(error)


@dataclass(frozen=True)
class PlanReport:
    """A plan and what it rests on."""

    arms: PlannedArms
    target: Target
    lengths: Lengths
    predictions: Mapping[str, Prediction]
    fit: Fit | str | None = None
    """What fits, or why nothing does; None: everything fits as it is."""
    is_fitted: bool = False
    """The predictions are those of the settings that fit."""


def planned_arms(name: str, *, overrides: Sequence[str]) -> PlannedArms:
    """Returns the placements of a run's or a study's configuration; no weights are needed.

    Args:
        name: A YAML file, or the name of a shipped one.
        overrides: ``key=value`` each.

    Raises:
        UsageError: If it is not valid, or the model's architecture cannot be had.
    """
    path = find_config(name)
    if "arms" in read_yaml(path):
        return _of_study(name, title=path.stem, overrides=overrides)
    config = load_config(name, overrides=overrides)
    architecture, inventory = _model(config)
    lora = config.lora
    plan = resolve_placement(lora.placement, inventory=inventory, rank=lora.rank, alpha=lora.alpha)
    plan.require_trainable(quantization=config.quantization)
    return PlannedArms(
        path.stem, config, architecture, {plan.placement: plan}, {plan.placement: 1}, ()
    )


def _model(config: Config) -> tuple[dict[str, Any], Inventory]:
    from loracle.model.inventory import inventory_from_architecture
    from loracle.sources import model_architecture

    architecture = model_architecture(config.model)
    return architecture, inventory_from_architecture(architecture)


def _of_study(name: str, *, title: str, overrides: Sequence[str]) -> PlannedArms:
    from loracle.study.config import StrategicConfig
    from loracle.study.file import load_study
    from loracle.study.plan import plan_study
    from loracle.study.search import search_runs

    study, base = load_study(name, overrides=overrides)
    architecture, inventory = _model(base)
    chosen = {
        arm: given.placement.strategic
        for arm, given in study.arms.items()
        if isinstance(given.placement, StrategicConfig)
    }
    # Real scores need the weights. What a set of modules costs depends on which they are only by
    # how low the lowest of them lies, so one that is drawn stands in.
    drawn: dict[str, Mapping[str, float]] = {
        kind: {
            module.name: float(stream_seed(0, "stand-in", kind, module.name))
            for module in inventory.modules
        }
        for kind in set(chosen.values())
    }
    plan = plan_study(study, base=base, name=title, inventory=inventory, scores=drawn)
    runs = [*search_runs(plan), *plan.runs]
    return PlannedArms(
        title=title,
        config=base,
        architecture=architecture,
        plans={arm.name: arm.plan for arm in plan.arms},
        num_runs={arm.name: sum(run.arm == arm.name for run in runs) for arm in plan.arms},
        stand_ins=tuple(chosen),
    )
