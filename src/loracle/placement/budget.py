"""Budgets that the arms of a study share: one rank, or one number of trainable parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from loracle.config.run import PlacementConfig
from loracle.errors import PlacementError
from loracle.placement.inventory import Inventory, LinearModule
from loracle.placement.plan import ModulePlan, most_common_rank
from loracle.placement.resolve import own_ranks, placement_label, select_modules

Budget = Literal["equal-rank", "equal-parameters"]


def params_per_rank(modules: Iterable[LinearModule]) -> int:
    """Returns the adapter parameters of ``modules`` at rank 1: one rank step."""
    return sum(module.in_features + module.out_features for module in modules)


def rank_for(modules: Iterable[LinearModule], *, target_params: int) -> int:
    """Returns the rank at which the adapters of ``modules`` are closest to ``target_params``.

    At most half a rank step away; the smaller of two equally close ranks. It may exceed the largest
    rank that the update of a narrow layer can have (`PlannedModule.is_overranked`).

    Raises:
        PlacementError: If rank 1 already exceeds the target by more than half a rank step.
    """
    step = params_per_rank(modules)
    if 2 * target_params < step:
        raise PlacementError(
            f"a budget of {max(target_params, 0):,} parameters is too small for one rank, "
            f"which takes {step:,}; adapt fewer modules, or give the reference a larger rank"
        )
    below, rest = divmod(target_params, step)
    return max(1, below + (2 * rest > step))


def rank_under(
    placement: str | PlacementConfig,
    *,
    inventory: Inventory,
    reference_plan: ModulePlan,
    budget: Budget,
) -> tuple[int, float]:
    """Returns the (rank, alpha) with which a run of ``placement`` meets the budget.

    ``equal-rank`` is the rank of ``reference_plan``; ``equal-parameters`` matches its parameters as
    closely as a whole rank can. Both keep its alpha / r. Ranks that the placement itself gives to
    some modules stay, and the others share the rest of the budget; if it gives all of them, there
    is nothing to choose.

    Raises:
        PlacementError: If the placement does not resolve, or the budget is too small for one rank.
    """
    rank, alpha = most_common_rank(reference_plan)
    if budget == "equal-rank":
        return rank, alpha
    modules = select_modules(placement, inventory=inventory)
    own = own_ranks(placement, modules=modules, inventory=inventory)
    free = [module for module in modules if module.name not in own]
    taken = sum(own[m.name] * params_per_rank([m]) for m in modules if m.name in own)
    if not free:
        return rank, alpha
    try:
        fitted = rank_for(free, target_params=reference_plan.trainable_params - taken)
    except PlacementError as error:
        where = f"placement '{placement_label(placement)}'"
        note = f" (the ranks it gives itself take {taken:,})" if taken else ""
        raise PlacementError(f"{where}: {error}{note}") from None
    return fitted, alpha if fitted == rank else fitted * alpha / rank


def gap_frac(plan: ModulePlan, *, reference_plan: ModulePlan) -> float:
    """Returns (parameters of the plan / parameters of the reference) - 1."""
    return plan.trainable_params / reference_plan.trainable_params - 1
