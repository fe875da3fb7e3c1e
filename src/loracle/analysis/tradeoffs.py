"""Loss against cost: the Pareto set with its uncertainty.

An arm is dominated only if another one is established to cost no more and to be better. Costs are
compared seed by seed, over the same batches. An arm is undecided if another one may cost no more
and may be as good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loracle.analysis.comparison import Comparison
from loracle.analysis.costs import (
    AXES,
    Axis,
    Cost,
    amount_words,
    costs_more,
    costs_no_more,
    costs_of,
)
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord

State = Literal["efficient", "dominated", "undecided"]


@dataclass(frozen=True)
class ParetoArm:
    """An arm on one axis of cost."""

    arm: str
    cost: Cost
    loss_nats_per_token: float
    """Mean over seeds."""
    comparison: Comparison | None
    """Loss against the reference arm; None: it is the reference."""
    state: State
    """``efficient``: every arm is established to cost more, or to be worse."""
    rivals: tuple[str, ...]
    """Arms that dominate it; for an undecided arm, those that may cost no more and be as good."""
    reason: str
    """The state in one sentence."""

    @property
    def difference(self) -> float | None:
        """Loss minus the reference's, nats per token; None: no seed in common."""
        return self.comparison.difference if self.comparison else 0.0


Fronts = Mapping[Axis, tuple[ParetoArm, ...]]
"""The arms by cost."""


def fronts_of(study: StudyRecord, verdicts: Verdicts) -> Fronts:
    """Returns `pareto` of every cost."""
    return {axis: pareto(study, verdicts, axis) for axis in AXES}


def pareto(study: StudyRecord, verdicts: Verdicts, axis: Axis) -> tuple[ParetoArm, ...]:
    """Returns every arm whose loss and cost were measured, in the study's order."""
    costs = {arm: cost for arm, cost in costs_of(study, axis).items() if verdicts.summary(arm)}
    return tuple(_placed(arm, costs=costs, verdicts=verdicts) for arm in costs)


def _placed(arm: str, *, costs: dict[str, Cost], verdicts: Verdicts) -> ParetoArm:
    cost = costs[arm]
    near = [other for other in costs if other != arm and not costs_more(costs[other], cost)]
    better = [
        other
        for other in near
        if costs_no_more(costs[other], cost) and verdicts.is_worse(arm, other)
    ]
    rivals = better or [other for other in near if not verdicts.is_worse(other, arm)]
    state: State = "dominated" if better else "undecided" if rivals else "efficient"
    summary = verdicts.summary(arm)
    assert summary is not None, "only arms with a completed run are placed"
    assert summary.loss_nats_per_token is not None, "a completed run has a loss"
    return ParetoArm(
        arm=arm,
        cost=cost,
        loss_nats_per_token=summary.loss_nats_per_token.mean,
        comparison=verdicts.comparison(arm),
        state=state,
        rivals=tuple(rivals),
        reason=_reason(state, cost, rivals=rivals, is_cheapest=not near),
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
