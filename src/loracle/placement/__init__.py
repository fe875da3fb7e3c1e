"""Where adapters go: presets and patterns resolved to an explicit list of modules and ranks.

Imports config and the root modules; no torch.
"""

from loracle.placement.budget import Budget, gap_frac, params_per_rank, rank_for, rank_under
from loracle.placement.inventory import Inventory, LinearModule, Role
from loracle.placement.names import layer_ranges
from loracle.placement.plan import ModulePlan, PlannedModule
from loracle.placement.presets import PATTERNS, PRESETS
from loracle.placement.resolve import placement_label, resolve_placement, select_modules
from loracle.placement.selection import (
    SCORES,
    Score,
    named_placement,
    random_share,
    select_modules_by_score,
)

__all__ = [
    "PATTERNS",
    "PRESETS",
    "SCORES",
    "Budget",
    "Inventory",
    "LinearModule",
    "ModulePlan",
    "PlannedModule",
    "Role",
    "Score",
    "gap_frac",
    "layer_ranges",
    "named_placement",
    "params_per_rank",
    "placement_label",
    "random_share",
    "rank_for",
    "rank_under",
    "resolve_placement",
    "select_modules",
    "select_modules_by_score",
]
