"""Which arm to take under a constraint, in words that claim no more than was established.

Of the arms that meet the constraint, those not established to be worse than the one with the lowest
mean loss count as equally good, and the cheapest of them is recommended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from loracle.analysis.costs import Axis, Cost, amount_words, arm_costs, costs_more
from loracle.analysis.rate_search import SharedRate, shared_rate
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord

# Costs by which equally good arms are ordered, after those that are constrained.
_PREFERENCE: tuple[Axis, ...] = ("peak_memory_gib", "step_time_s", "trainable_params")


@dataclass(frozen=True)
class Recommendation:
    """An arm to take, and why."""

    arm: str | None
    """Its name; None: no arm meets the constraint, or the arms' rates allow no advice."""
    words: str
    """The recommendation, with its figures."""


def recommend(
    study: StudyRecord,
    verdicts: Verdicts,
    *,
    max_memory_gib: float | None = None,
    max_step_time_s: float | None = None,
) -> Recommendation:
    """Returns the arm to take; limits hold for the arm's most expensive run."""
    if rate := shared_rate(study):
        return Recommendation(None, _no_advice(rate))
    requested: dict[Axis, float | None] = {
        "peak_memory_gib": max_memory_gib,
        "step_time_s": max_step_time_s,
    }
    limits = {axis: limit for axis, limit in requested.items() if limit is not None}
    losses = {
        summary.arm: summary.loss_nats_per_token.mean
        for summary in verdicts.summaries
        if summary.loss_nats_per_token
    }
    arms = sorted(losses, key=lambda arm: losses[arm])
    costs = {arm: arm_costs(study, arm) for arm in arms}
    fitting = [arm for arm in arms if _fits(costs[arm], limits)]
    alike = [
        arm for arm in fitting[1:] if not any(verdicts.is_worse(arm, other) for other in fitting)
    ]
    choice = _Choice(limits, losses, costs, fitting, alike)
    return Recommendation(arm=choice.cheapest[0], words=_words(choice))


@dataclass(frozen=True)
class _Choice:
    """What a recommendation is made from."""

    limits: Mapping[Axis, float]
    losses: Mapping[str, float]
    costs: Mapping[str, Mapping[Axis, Cost]]
    fitting: list[str]
    """Arms that meet the limits, lowest mean loss first."""
    alike: list[str]
    """Other fitting arms not established to be worse than any that fits."""

    @cached_property
    def cheapest(self) -> tuple[str | None, Axis | None]:
        """The cheapest of those that are alike, and the cost by which it beats the first."""
        if not self.fitting:
            return None, None
        left: list[str] = [self.fitting[0], *self.alike]
        saves: Axis | None = None
        for axis in dict.fromkeys((*self.limits, *_PREFERENCE)):
            cheap = _cheapest_on(axis, left, self.costs)
            first = self.fitting[0]
            if first in left and first not in cheap:
                saves = axis
                first_cost = self.costs[first][axis]
                cheap = [arm for arm in cheap if costs_more(first_cost, self.costs[arm][axis])]
            left = cheap
        return left[0], saves


def _cheapest_on(
    axis: Axis, arms: list[str], costs: Mapping[str, Mapping[Axis, Cost]]
) -> list[str]:
    """Returns the arms that may cost as little as the cheapest; all if one was not measured."""
    if any(axis not in costs[arm] for arm in arms):
        return arms
    least = min((costs[arm][axis] for arm in arms), key=lambda cost: cost.median)
    return [arm for arm in arms if not costs_more(costs[arm][axis], least)]


def _fits(costs: Mapping[Axis, Cost], limits: Mapping[Axis, float]) -> bool:
    return all(axis in costs and costs[axis].high <= limit for axis, limit in limits.items())


def _no_advice(rate: SharedRate) -> str:
    return (
        f"No placement is recommended: arms of rank {rate.lowest_rank} to {rate.highest_rank} ran "
        f"at one learning rate, {rate.learning_rate:g}, and another rate can reverse their order. "
        f"Search a rate for each arm: search.learning_rates in the study's file."
    )


def _words(choice: _Choice) -> str:
    within = _within(choice.limits)
    if not choice.fitting:
        return f"{within}no arm was measured to fit."
    lowest, (chosen, saves) = choice.fitting[0], choice.cheapest
    sentence = (
        f"{within}{lowest} has the lowest mean loss ({choice.losses[lowest]:.4f} nats per token)"
    )
    if len(choice.fitting) == 1 and choice.limits:
        return f"{within}only {lowest} fits ({choice.losses[lowest]:.4f} nats per token)."
    if not choice.alike:
        others = "every other arm that fits" if choice.limits else "every other arm"
        return f"{sentence}, and {others} is established to be worse: take {lowest}."
    sentence = f"{sentence}; {_listed(choice.alike)} cannot be told apart from it"
    if chosen == lowest or chosen is None or saves is None:
        verb = "is" if len(choice.alike) == 1 else "are"
        cheaper = f"{verb} not established to cost less memory, time or parameters"
        return f"{sentence} and {cheaper}: take {lowest}."
    chosen_cost, lowest_cost = (
        amount_words(saves, choice.costs[a][saves].median) for a in (chosen, lowest)
    )
    who = "" if choice.alike == [chosen] else f"{chosen} "
    return f"{sentence} and {who}costs least ({chosen_cost} against {lowest_cost}): take {chosen}."


def _within(limits: Mapping[Axis, float]) -> str:
    """Returns e.g. ``Within 8 GiB: ``, or nothing without limits."""
    units: dict[Axis, str] = {"peak_memory_gib": "GiB", "step_time_s": "s per step"}
    listed = [f"{limit:g} {units[axis]}" for axis, limit in limits.items()]
    return f"Within {_listed(listed)}: " if listed else ""


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
