"""Where adapters go: presets and patterns resolved to an explicit list of modules and ranks."""

from loracle.placement.adapters import peft_config_of
from loracle.placement.inventory import Inventory, LinearModule, Role
from loracle.placement.plan import ModulePlan, PlannedModule
from loracle.placement.presets import presets
from loracle.placement.resolve import placement_label, resolve_placement, select_modules

__all__ = [
    "Inventory",
    "LinearModule",
    "ModulePlan",
    "PlannedModule",
    "Role",
    "peft_config_of",
    "placement_label",
    "presets",
    "resolve_placement",
    "select_modules",
]
