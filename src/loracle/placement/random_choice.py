"""Random placements: the control that tells a good choice of modules from a lucky one.

Every linear layer but the head is a candidate. Each has a place in the draw that is a function of
the seed and its own name (`loracle.seeds`), so a draw is uniform, needs no state, and can be
repeated by anyone from the seed that the study records.
"""

from __future__ import annotations

from loracle.placement.inventory import Inventory, LinearModule
from loracle.placement.presets import all_linear
from loracle.placement.selection import in_model_order, num_kept
from loracle.seeds import stream_seed


def random_share(inventory: Inventory, *, keep_frac: float, seed: int) -> tuple[str, ...]:
    """Returns a random fraction of the modules, in the model's order.

    Every set of that many modules is equally likely. Their parameters differ from draw to draw; a
    budget of equal parameters evens that out by the rank.

    Args:
        inventory: The model's linear layers.
        keep_frac: Fraction of the candidates, in (0, 1]; rounded, at least one.
        seed: Names the draw; another one is another draw.

    Raises:
        PlacementError: If the fraction is not in (0, 1].
    """
    drawn = _drawn(inventory, seed=seed)
    return in_model_order(drawn[: num_kept(len(drawn), keep_frac=keep_frac)], inventory=inventory)


def _drawn(inventory: Inventory, *, seed: int) -> list[LinearModule]:
    """Returns the candidates in an order of which every permutation is equally likely."""
    return sorted(
        all_linear(inventory),
        key=lambda module: stream_seed(seed, "placement", module.name),
    )
