"""Random placements: the control that tells a good choice of modules from a lucky one.

Every linear layer but the head is a candidate. Each has a place in the draw that is a function of
the seed and its own name (`loracle.seeds`), so a draw is uniform, needs no state, and can be
repeated by anyone from the seed that the study records.
"""

from __future__ import annotations

from collections.abc import Sequence

from loracle.errors import PlacementError
from loracle.placement.budget import params_per_rank
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


def random_modules(
    inventory: Inventory, *, like: Sequence[LinearModule] | int, seed: int
) -> tuple[str, ...]:
    """Returns random modules with as many parameters as ``like`` at the same rank, or nearly.

    In the order of the draw, each module is taken that still fits. What then misses is less than
    the smallest module left over, which is added if that comes closer; so the gap is at most half
    of that module, and only the last places of a draw favour small modules.

    Args:
        inventory: The model's linear layers.
        like: The strategic modules, or their parameters at rank 1 (`budget.params_per_rank`).
        seed: Names the draw; another one is another draw.

    Raises:
        PlacementError: If there are no such modules: too little for one, or more than all have.
    """
    drawn = _drawn(inventory, seed=seed)
    target = like if isinstance(like, int) else params_per_rank(like)
    if target > params_per_rank(drawn):
        raise PlacementError(
            f"random placement: {target:,} parameters at rank 1 are more than all "
            f"{len(drawn)} modules have ({params_per_rank(drawn):,})"
        )
    taken, others, left = _filled(drawn, room=target)
    spare = min(others, key=_size, default=None)
    if spare is not None and 2 * left > _size(spare):
        taken.append(spare)
    if not taken:
        raise PlacementError(
            f"random placement: {target:,} parameters at rank 1 are too few for one module"
        )
    return in_model_order(taken, inventory=inventory)


def _drawn(inventory: Inventory, *, seed: int) -> list[LinearModule]:
    """Returns the candidates in an order of which every permutation is equally likely."""
    return sorted(
        all_linear(inventory),
        key=lambda module: stream_seed(seed, "placement", module.name),
    )


def _filled(
    drawn: Sequence[LinearModule], *, room: int
) -> tuple[list[LinearModule], list[LinearModule], int]:
    """Returns the modules that fit, each taken if it still does, the others, and the room left."""
    taken: list[LinearModule] = []
    others: list[LinearModule] = []
    for module in drawn:
        fits = _size(module) <= room
        (taken if fits else others).append(module)
        room -= _size(module) if fits else 0
    return taken, others, room


def _size(module: LinearModule) -> int:
    return params_per_rank([module])
