"""What an arm's loss costs: the Pareto set with its uncertainty, and a recommendation in words.

An arm is dominated only if another one is established to cost no more and to be better. Costs are
compared seed by seed, over the same batches. Where an arm that may cost no more may be as good, the
arm is undecided: whether its price buys anything is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loracle.analysis.comparison import Comparison
from loracle.analysis.costs import (
    Axis,
    Cost,
    amount_words,
    arm_costs,
    costs_more,
    costs_no_more,
)
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord

State = Literal["efficient", "dominated", "undecided"]


@dataclass(frozen=True)
class ParetoArm:
    """An arm on one axis of cost."""

    arm: str
    """Its name."""
    cost: Cost
    """Over its runs."""
    loss_nats_per_token: float
    """Mean over its seeds."""
    comparison: Comparison | None
    """With the reference arm: the loss difference and its interval; None: it is the reference."""
    state: State
    """``efficient``: every arm is established to cost more, or to be worse."""
    rivals: tuple[str, ...]
    """Arms that dominate it; of an undecided arm, those that are neither established to cost more
    nor to be worse."""
    reason: str
    """The state in one sentence."""

    @property
    def difference(self) -> float | None:
        """Loss minus the reference's, nats per token; None: no seed in common."""
        return self.comparison.difference if self.comparison else 0.0


def pareto(study: StudyRecord, verdicts: Verdicts, axis: Axis) -> tuple[ParetoArm, ...]:
    """Returns every arm whose loss and cost were measured, in the study's order."""
    costs = {
        arm.name: cost
        for arm in study.arms
        if (cost := arm_costs(study, arm.name).get(axis)) and verdicts.summary(arm.name)
    }
    return tuple(_placed(arm, costs=costs, verdicts=verdicts) for arm in costs)


def _placed(arm: str, *, costs: dict[str, Cost], verdicts: Verdicts) -> ParetoArm:
    mine = costs[arm]
    near = [other for other in costs if other != arm and not costs_more(costs[other], mine)]
    better = [
        other
        for other in near
        if costs_no_more(costs[other], mine) and verdicts.is_worse(arm, other)
    ]
    rivals = better or [other for other in near if not verdicts.is_worse(other, arm)]
    state: State = "dominated" if better else "undecided" if rivals else "efficient"
    summary = verdicts.summary(arm)
    assert summary is not None, "only arms with a completed run are placed"
    assert summary.loss_nats_per_token is not None, "a completed run has a loss"
    return ParetoArm(
        arm=arm,
        cost=mine,
        loss_nats_per_token=summary.loss_nats_per_token.mean,
        comparison=verdicts.comparison(arm),
        state=state,
        rivals=tuple(rivals),
        reason=_reason(state, mine, rivals=rivals, is_cheapest=not near),
    )


def _reason(state: State, cost: Cost, *, rivals: list[str], is_cheapest: bool) -> str:
    price, named = amount_words(cost.axis, cost.median), ", ".join(rivals)
    if state == "dominated":
        return f"{price}: {named} costs no more and has a lower loss."
    if state == "undecided":
        return f"{price}: {named} may cost no more, and may have as low a loss."
    if is_cheapest:
        return f"{price}: every other arm costs more."
    return f"{price}: every arm that may cost no more has a higher loss."
