"""Resolves a placement, as a person writes it, to an explicit plan.

PEFT silently accepts a target that matches nothing and a layer that does not exist; here each is an
error that names the nearest choice, before a weight is loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loracle.config.run import PlacementConfig
from loracle.errors import PlacementError, did_you_mean
from loracle.placement.inventory import Inventory, LinearModule
from loracle.placement.names import layer_ranges, matching, nearest_name
from loracle.placement.plan import FULL, ModulePlan, PlannedModule
from loracle.placement.presets import PATTERNS, PRESETS, counted_names, counted_preset, in_layers
from loracle.placement.ranks import module_ranks

# assumed: a label is a column of a table and part of a file name.
_MAX_LABEL_CHARS = 60


def resolve_placement(
    placement: str | PlacementConfig, *, inventory: Inventory, rank: int, alpha: float
) -> ModulePlan:
    """Returns the modules that ``placement`` adapts, each with its rank and alpha.

    Args:
        placement: A preset, a module kind (``q_proj``), or modules, layers and ranks.
        inventory: The model's linear layers.
        rank: Rank of every adapter to which the placement gives none of its own.
        alpha: All updates are scaled by alpha / rank.

    Raises:
        PlacementError: If a name matches no linear layer, a layer does not exist, ranks contradict
            each other, or the rank or alpha is not positive.
    """
    if rank < 1 or not alpha > 0:
        raise PlacementError(f"rank {rank}, alpha {alpha:g}: both must be positive")
    if placement == FULL:
        return ModulePlan(placement=FULL, modules=(), base_params=inventory.total_params)
    modules = select_modules(placement, inventory=inventory)
    own = own_ranks(placement, modules=modules, inventory=inventory)
    planned = []
    for module in modules:
        r = own.get(module.name, rank)
        planned.append(
            PlannedModule(
                name=module.name,
                rank=r,
                alpha=float(alpha) if r == rank else r * alpha / rank,
                in_features=module.in_features,
                out_features=module.out_features,
                layer=module.layer,
                kind=module.kind,
                fan_in_fan_out=module.fan_in_fan_out,
            )
        )
    return ModulePlan(placement_label(placement), tuple(planned), inventory.total_params)


def select_modules(
    placement: str | PlacementConfig, *, inventory: Inventory
) -> tuple[LinearModule, ...]:
    """Returns the modules that ``placement`` names, in the model's order, each once.

    Raises:
        PlacementError: As ``resolve_placement``.
    """
    with _naming(placement):
        if isinstance(placement, str):
            modules = _named(placement, inventory=inventory)
        else:
            modules = _custom(placement, inventory=inventory)
        if not modules:
            kinds = ", ".join(inventory.kinds()) or "none"
            raise PlacementError(f"the model has no such linear layer (there are {kinds})")
        return modules


def own_ranks(
    placement: str | PlacementConfig, *, modules: Sequence[LinearModule], inventory: Inventory
) -> dict[str, int]:
    """Returns the ranks that the placement itself gives to some of ``modules``, by full name.

    Raises:
        PlacementError: If a key of its ranks matches none of them, or keys contradict each other.
    """
    if isinstance(placement, str) or placement.ranks is None:
        return {}
    with _naming(placement):
        return module_ranks(placement.ranks, modules=modules, num_layers=inventory.num_layers)


def placement_label(placement: str | PlacementConfig) -> str:
    """Returns a stable name for a placement, e.g. ``q_proj+v_proj@0-3,7`` or ``*:q_proj=8``."""
    if isinstance(placement, str):
        return placement
    modules = sorted(set(placement.modules))
    layers = f"@{layer_ranges(placement.layers)}" if placement.layers else ""
    ranks = ",".join(f"{key}={rank}" for key, rank in sorted((placement.ranks or {}).items()))
    label = "+".join(modules) + layers + (f":{ranks}" if ranks else "")
    if len(label) <= _MAX_LABEL_CHARS:
        return label
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    more = f"+{len(modules) - 1}" if len(modules) > 1 else ""
    return f"{modules[0][:40]}{more}~{digest}"


@contextmanager
def _naming(placement: str | PlacementConfig) -> Iterator[None]:
    """Prefixes errors inside the block with the placement, in one line whatever it quotes."""
    try:
        yield
    except PlacementError as error:
        message = f"placement '{placement_label(placement)}': {error}"
        raise PlacementError(" ".join(message.split())) from None


def _named(placement: str, *, inventory: Inventory) -> tuple[LinearModule, ...]:
    if placement == FULL:
        raise PlacementError("trains every weight: it has no modules with adapters to choose from")
    if placement in PRESETS:
        return PRESETS[placement][1](inventory)
    counted = counted_preset(placement, inventory=inventory)
    if counted is not None:
        return counted
    if placement in inventory.kinds():
        return matching(placement, inventory.modules)
    if "." in placement or "*" in placement:
        raise PlacementError(
            f"a full name or pattern goes in a list: placement: {{modules: ['{placement}']}}"
        )
    number = re.search(r"\d+", placement)
    examples = counted_names(int(number[0]) if number else max(1, inventory.num_layers // 2))
    nearest = did_you_mean(placement, [*PRESETS, FULL, *inventory.kinds(), *examples])
    raise PlacementError(
        f"no such preset or module kind (presets: {', '.join([*PRESETS, *PATTERNS, FULL])}; "
        f"kinds: {', '.join(inventory.kinds())}){nearest}"
    )


def _custom(placement: PlacementConfig, *, inventory: Inventory) -> tuple[LinearModule, ...]:
    candidates = inventory.modules
    if placement.layers is not None:
        last = inventory.num_layers - 1
        absent = sorted({layer for layer in placement.layers if not 0 <= layer <= last})
        if absent:
            raise PlacementError(
                f"layers: {', '.join(map(str, absent))} not in the model, "
                f"which has layers 0 to {last}"
            )
        candidates = in_layers(candidates, layers=placement.layers)
    chosen: set[str] = set()
    for entry in placement.modules:
        matches = matching(entry, candidates)
        if not matches:
            raise PlacementError(_unmatched(entry, inventory=inventory))
        chosen.update(module.name for module in matches)
    modules = tuple(module for module in candidates if module.name in chosen)
    unused = set(placement.layers or ()) - {module.layer for module in modules}
    if unused:
        raise PlacementError(f"layers: none of these modules is in {layer_ranges(unused)}")
    return modules


def _unmatched(entry: str, *, inventory: Inventory) -> str:
    """Returns why ``entry`` matches nothing: wrong layers, a preset, a suffix, or a wrong name."""
    elsewhere = matching(entry, inventory.modules)
    if elsewhere:
        layers = layer_ranges(module.layer for module in elsewhere if module.layer is not None)
        place = f"only in layers {layers}" if layers else "outside the layers"
        return f"modules: '{entry}' is {place}, which this placement's layers leave out"
    problem = f"modules: '{entry}' matches no linear layer"
    if entry in PRESETS:
        return f"{problem}; a preset stands alone: placement: {entry}"
    if any(module.name.endswith(f".{entry}") for module in inventory.modules):
        return f"{problem}; did you mean '*.{entry}'?"
    kinds = ", ".join(inventory.kinds())
    return f"{problem} (kinds: {kinds}){nearest_name(entry, inventory.modules)}"
