"""Ranks of single modules: which key of a placement's ``ranks`` decides for which module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from loracle.errors import PlacementError
from loracle.placement.inventory import LinearModule
from loracle.placement.names import layer_ranges, matching, nearest_name

_LAYERS = "layers:"

# How narrowly a key names a module; the lowest decides.
_NAME, _PATTERN, _KIND, _RANGE = range(4)


def module_ranks(
    ranks: Mapping[str, int], *, modules: Sequence[LinearModule], num_layers: int
) -> dict[str, int]:
    """Returns r by full name, of those modules that have one of their own.

    The most specific key decides: a full name before a pattern before a kind before
    ``layers:0-3,7``. So one may give a rank to some layers and except a module from it.

    Args:
        ranks: r by key.
        modules: What the placement adapts.
        num_layers: Blocks of the model.

    Raises:
        PlacementError: If a key matches none of the modules, names a layer without any, decides
            nothing because others always go before it, or contradicts one as specific as itself.
    """
    hits = {key: _hits(key, modules=modules, num_layers=num_layers) for key in ranks}
    found: dict[str, int] = {}
    decisive: set[str] = set()
    for module in modules:
        levels = {key: hit[module.name] for key, hit in hits.items() if module.name in hit}
        if levels:
            keys = [key for key, level in levels.items() if level == min(levels.values())]
            found[module.name] = _agreed(keys, ranks=ranks, module=module)
            decisive.update(keys)
    for key in ranks:
        if key not in decisive:
            raise PlacementError(
                f"ranks: '{key}' decides nothing, every module it matches has a more specific key"
            )
    return found


def _agreed(keys: Sequence[str], *, ranks: Mapping[str, int], module: LinearModule) -> int:
    if len({ranks[key] for key in keys}) > 1:
        both = " and ".join(f"'{key}' ({ranks[key]})" for key in keys)
        raise PlacementError(
            f"ranks: {both} are equally specific and disagree on {module.name}; "
            "give its full name a rank, or narrow one of them"
        )
    return ranks[keys[0]]


def _hits(key: str, *, modules: Sequence[LinearModule], num_layers: int) -> dict[str, int]:
    """Returns how narrowly ``key`` names each module that it matches."""
    if key.startswith(_LAYERS):
        layers = _layers(key, num_layers=num_layers)
        unused = set(layers) - {module.layer for module in modules}
        if unused:
            raise PlacementError(
                f"ranks: '{key}': this placement has no module in {layer_ranges(unused)}"
            )
        return {module.name: _RANGE for module in modules if module.layer in layers}
    hit = matching(key, modules)
    if not hit:
        kinds = ", ".join(dict.fromkeys(module.kind for module in modules))
        raise PlacementError(
            f"ranks: '{key}' matches no module of this placement (kinds: {kinds}; or a full name, "
            f"a pattern, layers:0-3,7){nearest_name(key, modules)}"
        )
    return {module.name: _level(key, module) for module in hit}


def _level(key: str, module: LinearModule) -> int:
    if key == module.name:
        return _NAME
    return _KIND if key == module.kind else _PATTERN


def _layers(key: str, *, num_layers: int) -> frozenset[int]:
    layers: set[int] = set()
    for part in key.removeprefix(_LAYERS).split(","):
        span = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if first > last:
            raise PlacementError(f"ranks: '{key}': layers are written as in layers:0-3,7")
        if last >= num_layers:
            raise PlacementError(
                f"ranks: '{key}': {last} not in the model, which has layers 0 to {num_layers - 1}"
            )
        layers.update(range(first, last + 1))
    return frozenset(layers)
