"""Ranks of single modules: decides which key of a placement's ``ranks`` applies to a module."""

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
    """Returns the rank of each of ``modules`` that a key of ``ranks`` matches, by full name.

    The most specific key decides: a full name before a pattern before a kind before
    ``layers:0-3,7``. So one may give a rank to some layers and except a module from it.

    Raises:
        PlacementError: If a key matches none of the modules, names a layer without any, decides
            nothing because others always go before it, or contradicts one as specific as itself.
    """
    hits = {key: _hits(key, modules=modules, num_layers=num_layers) for key in ranks}
    by_name: dict[str, int] = {}
    decisive: set[str] = set()
    for module in modules:
        levels = {key: hit[module.name] for key, hit in hits.items() if module.name in hit}
        if levels:
            keys = [key for key, level in levels.items() if level == min(levels.values())]
            by_name[module.name] = _agreed(keys, ranks=ranks, module=module)
            decisive.update(keys)
    for key in ranks:
        if key not in decisive:
            raise PlacementError(
                f"ranks: '{key}' decides nothing, every module it matches has a more specific key"
            )
    return by_name


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
    matched = matching(key, modules)
    if not matched:
        kinds = ", ".join(dict.fromkeys(module.kind for module in modules))
        raise PlacementError(
            f"ranks: '{key}' matches no module of this placement (kinds: {kinds}; or a full name, "
            f"a pattern, layers:0-3,7){nearest_name(key, modules)}"
        )
    return {
        module.name: {module.kind: _KIND, module.name: _NAME}.get(key, _PATTERN)
        for module in matched
    }


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
