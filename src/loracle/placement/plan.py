"""A placement made explicit: full module names with their ranks, alphas and parameter counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from loracle.errors import PlacementError

FULL = "full"
"""The placement without adapters: every weight of the model itself trains."""


@dataclass(frozen=True)
class PlannedModule:
    """One linear layer that gets an adapter."""

    name: str
    """Full dotted name in the base model."""
    rank: int
    """Rank r of its adapter."""
    alpha: float
    """Its update is scaled by alpha / rank."""
    in_features: int
    """Input features of the layer."""
    out_features: int
    """Output features of the layer."""
    layer: int | None
    """Index of its block, from 0; None outside the blocks."""
    kind: str
    """Last component of the name."""
    fan_in_fan_out: bool = False
    """The weight is stored as (in, out)."""

    @property
    def trainable_params(self) -> int:
        """Elements of A (rank x in) and B (out x rank)."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def is_overranked(self) -> bool:
        """True if r exceeds the largest possible rank of the update B A: the layer's smaller side.

        Wasteful but allowed: a budget counts parameters, and an arm of narrow layers may reach it
        in no other way.
        """
        return self.rank > min(self.in_features, self.out_features)


@dataclass(frozen=True)
class ModulePlan:
    """The modules and ranks that a placement resolves to for one model."""

    placement: str
    """Label of the placement."""
    modules: tuple[PlannedModule, ...]
    """The adapted layers, in the model's order, each once."""
    base_params: int
    """Parameters of the base model; tied ones are counted once."""

    @property
    def is_full(self) -> bool:
        """True for full fine-tuning: no adapters, all weights train."""
        return self.placement == FULL

    @property
    def trainable_params(self) -> int:
        """All adapter parameters; for full fine-tuning, all parameters of the model."""
        if self.is_full:
            return self.base_params
        return sum(module.trainable_params for module in self.modules)

    def require_trainable(self, *, quantization: str | None) -> None:
        """Raises PlacementError for full fine-tuning of weights packed in 4 bits."""
        if self.is_full and quantization is not None:
            raise PlacementError(
                f"placement '{FULL}': weights in 4 bits cannot train (quantization is "
                f"{quantization}); set quantization=null, or choose adapters"
            )

    @property
    def overranked(self) -> tuple[PlannedModule, ...]:
        """Modules whose rank exceeds the largest possible one; not an error."""
        return tuple(module for module in self.modules if module.is_overranked)

    @property
    def total_params(self) -> int:
        """Base and adapter parameters together."""
        return self.base_params + (0 if self.is_full else self.trainable_params)

    @property
    def lowest_layer(self) -> int | None:
        """First adapted block, where backpropagation stops; None if no block is adapted."""
        return min((m.layer for m in self.modules if m.layer is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data, with parameter counts for human readers."""
        return {
            "placement": self.placement,
            "base_params": self.base_params,
            "trainable_params": self.trainable_params,
            "modules": [
                asdict(module) | {"trainable_params": module.trainable_params}
                for module in self.modules
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModulePlan:
        """Returns the plan that ``to_json`` wrote.

        Raises:
            PlacementError: If a key is missing or the counts do not follow from the ranks.
        """
        try:
            plan = cls(
                placement=data["placement"],
                modules=tuple(
                    PlannedModule(
                        **{field.name: entry[field.name] for field in fields(PlannedModule)}
                    )
                    for entry in data["modules"]
                ),
                base_params=data["base_params"],
            )
            declared, counted = data["trainable_params"], plan.trainable_params
        except (KeyError, TypeError) as error:
            raise PlacementError(f"module plan: not a saved plan ({error!r})") from None
        if declared != counted:
            raise PlacementError(
                f"module plan '{plan.placement}': trainable_params is {declared}, "
                f"but its modules and ranks give {counted}"
            )
        return plan


def most_common_rank(plan: ModulePlan) -> tuple[int, float]:
    """Returns the (rank, alpha) that most modules of the plan have; the first wins a tie."""
    counts = Counter((module.rank, module.alpha) for module in plan.modules)
    return counts.most_common(1)[0][0]
