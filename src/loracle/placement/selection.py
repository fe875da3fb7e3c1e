"""Strategic placements: the best-scoring fraction of the modules, or a random one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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
    ranking = _ranking(scores, inventory=inventory)
    best = ranking[: num_kept(len(ranking), keep_frac=keep_frac)]
    return in_model_order(best, inventory=inventory)


def num_kept(candidates: int, *, keep_frac: float) -> int:
    """Returns ``keep_frac`` of the number of candidates, rounded, at least one.

    Raises:
        PlacementError: If the fraction is not in (0, 1].
    """
    if not 0 < keep_frac <= 1:
        raise PlacementError(f"keep_frac {keep_frac:g}: must be above 0 and at most 1")
    return max(1, math.floor(candidates * keep_frac + 0.5))


def named_placement(names: Collection[str]) -> PlacementConfig:
    """Returns the placement of exactly these modules."""
    return PlacementConfig(modules=list(names))


def _ranking(scores: Mapping[str, float], *, inventory: Inventory) -> list[LinearModule]:
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
    return sorted(candidates, key=lambda module: -scores[module.name])


def in_model_order(modules: Collection[LinearModule], *, inventory: Inventory) -> tuple[str, ...]:
    """Returns the names of ``modules`` as the model orders them."""
    names = {module.name for module in modules}
    return tuple(module.name for module in inventory.modules if module.name in names)


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
    return in_model_order(drawn[: num_kept(len(drawn), keep_frac=keep_frac)], inventory=inventory)
