"""`loracle plan`: from a configuration to what it takes and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loracle.errors import UsageError
from loracle.plan.arms import PlannedArms, planned_arms, predict_arms
from loracle.plan.fit import Fit, find_fit
from loracle.plan.lengths import lengths_of
from loracle.plan.predict import Prediction
from loracle.plan.target import Target, target_of
from loracle.plan.view import PlanReport


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
