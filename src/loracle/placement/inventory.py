"""The linear layers of a model that can carry an adapter, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["attention", "feed-forward", "head", "other"]


@dataclass(frozen=True)
class LinearModule:
    """One linear layer of a model."""

    name: str
    """Full dotted name, e.g. ``model.layers.3.self_attn.q_proj``."""
    kind: str
    """Last component of the name, e.g. ``q_proj``."""
    layer: int | None
    """Index of its block, from 0; None outside the blocks."""
    in_features: int
    """Input features."""
    out_features: int
    """Output features."""
    role: Role
    """Part of the model; ``other``: routers, state-space mixers, projections outside the blocks."""
    fan_in_fan_out: bool = False
    """PEFT's name for a weight stored as (in, out), as in GPT-2's Conv1D."""


@dataclass(frozen=True)
class Inventory:
    """All linear layers of a model, in the order in which the model registers them."""

    modules: tuple[LinearModule, ...]
    """Every linear layer, the output embedding included."""
    num_layers: int
    """Number of decoder blocks."""
    total_params: int
    """Parameters of the base model; tied ones are counted once."""

    def with_role(self, *roles: Role) -> tuple[LinearModule, ...]:
        """Returns the modules that have one of ``roles``."""
        return tuple(module for module in self.modules if module.role in roles)

    def kinds(self) -> tuple[str, ...]:
        """Returns each module kind once, in order of first appearance."""
        return tuple(dict.fromkeys(module.kind for module in self.modules))
