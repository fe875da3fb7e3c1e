"""From a placement, as a person writes it, to an explicit plan.

PEFT accepts a target that matches nothing, and a layer that does not exist, without a word; here
each is an error with the nearest choice, before a weight is loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from loracle.config import PlacementConfig
from loracle.errors import PlacementError, did_you_mean
from loracle.placement.inventory import Inventory, LinearModule
from loracle.placement.plan import ModulePlan, PlannedModule
from loracle.placement.presets import PATTERNS, PRESETS, counted_names, counted_preset, in_layers

# assumed: a label is a column of a table and part of a file name.
_MAX_LABEL_CHARS = 60


def resolve_placement(
    placement: str | PlacementConfig, *, inventory: Inventory, rank: int, alpha: float
) -> ModulePlan:
    """Returns the modules that ``placement`` adapts, each with ``rank`` and ``alpha``.

    Args:
        placement: A preset, a module kind (``q_proj``), or modules and layers.
        inventory: The model's linear layers.
        rank: r of every adapter.
        alpha: Every update is scaled by alpha / rank.

    Raises:
        PlacementError: If a name matches no linear layer, a layer does not exist, or the rank or
            alpha is not positive.
    """
    if rank < 1 or not alpha > 0:
        raise PlacementError(f"rank {rank}, alpha {alpha:g}: both must be positive")
    label = placement_label(placement)
    return ModulePlan(
        placement=label,
        modules=tuple(
            _planned(module, rank=rank, alpha=alpha)
            for module in select_modules(placement, inventory=inventory)
        ),
        base_params=inventory.total_params,
    )


def select_modules(
    placement: str | PlacementConfig, *, inventory: Inventory
) -> tuple[LinearModule, ...]:
    """Returns the modules that ``placement`` names, in the model's order, each once.

    Raises:
        PlacementError: As ``resolve_placement``.
    """
    # One line, whatever a quoted name contains.
    where = " ".join(f"placement '{placement_label(placement)}'".split())
    try:
        if isinstance(placement, str):
            chosen = _named(placement, inventory=inventory)
        else:
            chosen = _custom(placement, inventory=inventory)
    except PlacementError as error:
        raise PlacementError(f"{where}: {' '.join(str(error).split())}") from None
    if not chosen:
        kinds = ", ".join(inventory.kinds()) or "none"
        raise PlacementError(f"{where}: the model has no such linear layer (there are {kinds})")
    return chosen


def placement_label(placement: str | PlacementConfig) -> str:
    """Returns a stable name for a placement, e.g. ``q_proj+v_proj@0-3,7``."""
    if isinstance(placement, str):
        return placement
    modules = sorted(set(placement.modules))
    layers = f"@{layer_ranges(placement.layers)}" if placement.layers else ""
    label = "+".join(modules) + layers
    if len(label) <= _MAX_LABEL_CHARS:
        return label
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    more = f"+{len(modules) - 1}" if len(modules) > 1 else ""
    return f"{modules[0][:40]}{more}~{digest}"


def layer_ranges(layers: Iterable[int]) -> str:
    """Returns layer indices as runs, e.g. ``0-3,7``."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _planned(module: LinearModule, *, rank: int, alpha: float) -> PlannedModule:
    return PlannedModule(
        name=module.name,
        rank=rank,
        alpha=float(alpha),
        in_features=module.in_features,
        out_features=module.out_features,
        layer=module.layer,
        kind=module.kind,
        fan_in_fan_out=module.fan_in_fan_out,
    )


def _named(placement: str, *, inventory: Inventory) -> tuple[LinearModule, ...]:
    if placement in PRESETS:
        return PRESETS[placement][1](inventory)
    counted = counted_preset(placement, inventory=inventory)
    if counted is not None:
        return counted
    if placement in inventory.kinds():
        return _matching(placement, inventory.modules)
    if "." in placement or "*" in placement:
        raise PlacementError(
            f"a full name or pattern goes in a list: placement: {{modules: ['{placement}']}}"
        )
    raise PlacementError(
        f"no such preset or module kind (presets: {', '.join([*PRESETS, *PATTERNS])}; "
        f"kinds: {', '.join(inventory.kinds())}){_nearest_preset(placement, inventory)}"
    )


def _nearest_preset(placement: str, inventory: Inventory) -> str:
    number = re.search(r"\d+", placement)
    examples = counted_names(int(number[0]) if number else max(1, inventory.num_layers // 2))
    return did_you_mean(placement, [*PRESETS, *inventory.kinds(), *examples])


def _custom(placement: PlacementConfig, *, inventory: Inventory) -> tuple[LinearModule, ...]:
    candidates = inventory.modules
    if placement.layers is not None:
        _require_layers(placement.layers, num_layers=inventory.num_layers)
        candidates = in_layers(candidates, layers=placement.layers)
    chosen: set[str] = set()
    for entry in placement.modules:
        matches = _matching(entry, candidates)
        if not matches:
            raise PlacementError(_unmatched(entry, inventory=inventory))
        chosen.update(module.name for module in matches)
    modules = tuple(module for module in candidates if module.name in chosen)
    _require_use(placement.layers or (), modules=modules)
    return modules


def _matching(entry: str, modules: Iterable[LinearModule]) -> tuple[LinearModule, ...]:
    """Returns the modules whose kind or full name is ``entry``, or whose full name it globs."""
    return tuple(
        module
        for module in modules
        if entry in (module.kind, module.name) or fnmatchcase(module.name, entry)
    )


def _require_layers(layers: Sequence[int], *, num_layers: int) -> None:
    absent = sorted({layer for layer in layers if not 0 <= layer < num_layers})
    if absent:
        raise PlacementError(
            f"layers: {', '.join(map(str, absent))} not in the model, "
            f"which has layers 0 to {num_layers - 1}"
        )


def _require_use(layers: Iterable[int], *, modules: Sequence[LinearModule]) -> None:
    unused = sorted(set(layers) - {module.layer for module in modules})
    if unused:
        raise PlacementError(f"layers: none of these modules is in {layer_ranges(unused)}")


def _unmatched(entry: str, *, inventory: Inventory) -> str:
    """Returns why ``entry`` matches nothing: wrong layers, a preset, a suffix, or a wrong name."""
    elsewhere = _matching(entry, inventory.modules)
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
    return f"{problem} (kinds: {kinds}){_nearest_name(entry, inventory)}"


def _nearest_name(entry: str, inventory: Inventory) -> str:
    if "." not in entry:
        return did_you_mean(entry, inventory.kinds())
    names = [module.name for module in inventory.modules]
    nearest = difflib.get_close_matches(entry, names, n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
