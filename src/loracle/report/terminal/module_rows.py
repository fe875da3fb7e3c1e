"""A model's linear layers as rows of a table or map, and the ruler above its layers."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from loracle.placement import Inventory, LinearModule, Role


@dataclass(frozen=True)
class Row:
    """The modules that share a kind, a role and a shape."""

    label: str
    """The kind, with its parent where the kind alone names several things."""
    role: Role
    modules: tuple[LinearModule, ...]
    """In the model's order."""

    @property
    def layers(self) -> list[int]:
        """Layer of each module that has one."""
        return [module.layer for module in self.modules if module.layer is not None]


def rows_of(inventory: Inventory) -> list[Row]:
    """Returns the modules by kind, role and shape, in order of first appearance."""
    groups: dict[tuple[str, Role, int, int], list[LinearModule]] = defaultdict(list)
    for module in inventory.modules:
        key = (module.kind, module.role, module.in_features, module.out_features)
        groups[key].append(module)
    uses = Counter(kind for kind, *_ in groups)
    return [
        Row(_label(modules[0], ambiguous=uses[kind] > 1), role, tuple(modules))
        for (kind, role, *_), modules in groups.items()
    ]


def ruler(layers: range) -> str:
    """Returns the layers that are multiples of five, each above its own column."""
    return "".join(f"{layer:<5}" for layer in layers if layer % 5 == 0)


def _label(module: LinearModule, *, ambiguous: bool) -> str:
    return ".".join(module.name.split(".")[-2:]) if ambiguous else module.kind
