"""A placement under a budget, in the two steps that a study takes."""

from loracle.config.run import PlacementConfig
from loracle.placement import Budget, Inventory, ModulePlan, rank_under, resolve_placement


def planned_under(
    placement: str | PlacementConfig,
    *,
    inventory: Inventory,
    reference_plan: ModulePlan,
    budget: Budget,
) -> ModulePlan:
    rank, alpha = rank_under(
        placement, inventory=inventory, reference_plan=reference_plan, budget=budget
    )
    return resolve_placement(placement, inventory=inventory, rank=rank, alpha=alpha)
