"""Named placements, defined by a module's role and layer and not by one family's names.

Only q, k and v need names, because nothing but its name tells a query projection from a key
projection; a model that fuses them has no such placement, and the error says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from loracle.errors import PlacementError
from loracle.placement.inventory import Inventory, LinearModule, Role

Modules = tuple[LinearModule, ...]
Selector = Callable[[Inventory], Modules]

# Names of separate projections in the decoder-only models of Transformers.
SPLIT_PROJECTIONS = {
    "q": frozenset({"q_proj", "query", "query_proj", "q_lin", "q_attn", "wq", "to_q", "q"}),
    "k": frozenset({"k_proj", "key", "key_proj", "k_lin", "wk", "to_k", "k"}),
    "v": frozenset({"v_proj", "value", "value_proj", "v_lin", "wv", "to_v", "v"}),
}
_ANY_SPLIT = frozenset().union(*SPLIT_PROJECTIONS.values())


def all_linear(inventory: Inventory) -> Modules:
    """Returns every linear layer except the head, as PEFT's ``all-linear`` does."""
    return tuple(module for module in inventory.modules if module.role != "head")


def by_role(role: Role) -> Selector:
    """Returns the selector of every module with ``role``."""
    return lambda inventory: inventory.with_role(role)


def projections(*parts: str) -> Selector:
    """Returns the selector of the separate attention projections ``parts``, of ``q k v``.

    The selector raises PlacementError if a layer with attention lacks one of them, because a
    placement that silently skips some layers is another placement.
    """

    def select(inventory: Inventory) -> Modules:
        attention = inventory.with_role("attention")
        for part in parts:
            _require_in_every_layer(attention, part=part)
        kinds = frozenset().union(*(SPLIT_PROJECTIONS[part] for part in parts))
        return tuple(module for module in attention if module.kind in kinds)

    return select


def output_projections(inventory: Inventory) -> Modules:
    """Returns, of each attention and feed-forward part, the layer that writes the residual stream.

    That is the last registered one with ``hidden_size`` outputs that is not q, k or v: o_proj and
    down_proj in Llama, c_proj twice in GPT-2, dense and dense_4h_to_h in GPT-NeoX.
    """
    parts = inventory.with_role("attention", "feed-forward")
    # The width of the residual stream is what most projections of the blocks read.
    widths = Counter(module.in_features for module in parts)
    hidden = widths.most_common(1)[0][0] if widths else 0
    last: dict[tuple[str, Role], LinearModule] = {}
    for module in parts:
        is_input = module.role == "attention" and module.kind in _ANY_SPLIT
        if module.out_features == hidden and not is_input:
            last[module.name.rpartition(".")[0], module.role] = module
    chosen = {module.name for module in last.values()}
    return tuple(module for module in parts if module.name in chosen)


def third(index: int) -> Selector:
    """Returns the selector of all linear layers in one third of the blocks, 0 being the first."""

    def select(inventory: Inventory) -> Modules:
        num_layers = inventory.num_layers
        if num_layers < 3:
            raise PlacementError(f"needs at least 3 layers, the model has {num_layers}")
        layers = {layer for layer in range(num_layers) if 3 * layer // num_layers == index}
        return in_layers(all_linear(inventory), layers=layers)

    return select


def in_layers(modules: Iterable[LinearModule], *, layers: Iterable[int]) -> Modules:
    """Returns those of ``modules`` that lie in ``layers``."""
    chosen = frozenset(layers)
    return tuple(module for module in modules if module.layer in chosen)


PRESETS: dict[str, tuple[str, Selector]] = {
    "all-linear": ("every linear layer except the head", all_linear),
    "attention": ("every attention projection", by_role("attention")),
    "attention-qv": ("query and value projections", projections("q", "v")),
    "attention-qkv": ("query, key and value projections", projections("q", "k", "v")),
    "feed-forward": ("every feed-forward projection", by_role("feed-forward")),
    "output-projections": ("attention output and feed-forward down", output_projections),
    "lm-head": ("the output embedding alone", by_role("head")),
    "first-third": ("all-linear in the first third of the layers", third(0)),
    "middle-third": ("all-linear in the middle third of the layers", third(1)),
    "last-third": ("all-linear in the last third of the layers", third(2)),
}

PATTERNS: dict[str, str] = {
    "first-N": "all-linear in the first N layers, e.g. first-8",
    "last-N": "all-linear in the last N layers, e.g. last-8",
    "every-Nth": "all-linear in layers 0, N, 2N, ..., e.g. every-2nd",
}


def counted_preset(placement: str, *, inventory: Inventory) -> Modules | None:
    """Returns the modules of ``first-N``, ``last-N`` or ``every-Nth``; None for any other name.

    Raises:
        PlacementError: If N is not a number of layers that the model has.
    """
    match = re.fullmatch(r"(first|last|every)-(0|[1-9]\d*)(st|nd|rd|th)?", placement)
    if not match or placement not in counted_names(int(match[2])):
        return None
    count, num_layers = int(match[2]), inventory.num_layers
    if not 1 <= count <= num_layers:
        raise PlacementError(f"the model has {num_layers} layers, so N is 1 to {num_layers}")
    layers = {
        "first": range(count),
        "last": range(num_layers - count, num_layers),
        "every": range(0, num_layers, count),
    }[match[1]]
    return in_layers(all_linear(inventory), layers=layers)


def counted_names(count: int) -> tuple[str, str, str]:
    """Returns the three counted presets of N = ``count``, e.g. first-2, last-2, every-2nd."""
    teens = 10 < count % 100 < 20
    suffix = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"first-{count}", f"last-{count}", f"every-{count}{suffix}"


def _require_in_every_layer(attention: Modules, *, part: str) -> None:
    layers = dict.fromkeys(module.layer for module in attention)
    covered = {module.layer for module in attention if module.kind in SPLIT_PROJECTIONS[part]}
    for layer in layers:
        if layer not in covered:
            there = dict.fromkeys(module.kind for module in attention if module.layer == layer)
            raise PlacementError(
                f"layer {layer} has no {part} projection of its own: its attention is "
                f"{', '.join(there)}, so q, k and v are fused or named otherwise; "
                f"use 'attention', or name a module"
            )
