"""Strategic placements: the best-scoring fraction of the modules, or a random one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from loracle.config.run import PlacementConfig
from loracle.errors import PlacementError, did_you_mean
from loracle.placement.inventory import Inventory, LinearModule
from loracle.placement.presets import all_linear
from loracle.seeds import stream_seed

Score = Literal["gradient-energy", "feature-norm", "weight-gradient"]
SCORES: dict[Score, str] = {
    "gradient-energy": "how fast an adapter's parameters would lower the loss at the start",
    "feature-norm": "how little of the task the layer already responds to",
    "weight-gradient": "how much the loss depends on the layer's own weights",
}
"""The scores of a module and their meaning in one line; larger: adapt."""


def select_modules_by_score(
    scores: Mapping[str, float], *, inventory: Inventory, keep_frac: float
) -> tuple[str, ...]:
    """Returns the best fraction of the modules, in the model's order; ties go to the earlier.

    Args:
        scores: By full name; modules without one are not candidates.
        inventory: The model's linear layers.
        keep_frac: Fraction of the candidates, in (0, 1]; rounded, at least one.

    Raises:
        PlacementError: If a score has no module or is not finite, or the fraction is out of range.
    """
    names = {module.name for module in inventory.modules}
    for name, score in scores.items():
        if name not in names:
            raise PlacementError(
                f"scores: '{name}' is no linear layer{did_you_mean(name, sorted(names))}"
            )
        if not math.isfinite(score):
            raise PlacementError(f"scores: '{name}' has {score}, which cannot be compared")
    candidates = [module for module in inventory.modules if module.name in scores]
    if not candidates:
        raise PlacementError("scores: no module has one")
    # Python's sort is stable.
    ranking = sorted(candidates, key=lambda module: -scores[module.name])
    return _first(ranking, inventory=inventory, keep_frac=keep_frac)


def named_placement(names: Collection[str]) -> PlacementConfig:
    """Returns the placement of exactly these modules."""
    return PlacementConfig(modules=list(names))


def random_share(inventory: Inventory, *, keep_frac: float, seed: int) -> tuple[str, ...]:
    """Returns a random fraction of the modules, in the model's order.

    Every set of that size is equally likely. Its parameters differ from draw to draw; a budget of
    equal parameters compensates by the rank.

    Raises:
        PlacementError: If ``keep_frac``, as of `select_modules_by_score`, is not in (0, 1].
    """
    drawn = sorted(
        all_linear(inventory), key=lambda module: stream_seed(seed, "placement", module.name)
    )
    return _first(drawn, inventory=inventory, keep_frac=keep_frac)


def _first(
    ranking: Sequence[LinearModule], *, inventory: Inventory, keep_frac: float
) -> tuple[str, ...]:
    """Returns the first fraction of ``ranking``, rounded, at least one, in the model's order."""
    if not 0 < keep_frac <= 1:
        raise PlacementError(f"keep_frac {keep_frac:g}: must be above 0 and at most 1")
    count = max(1, math.floor(len(ranking) * keep_frac + 0.5))
    names = {module.name for module in ranking[:count]}
    return tuple(module.name for module in inventory.modules if module.name in names)
