"""Other orders of summation inside products, and faults of an adapter that the audit must see.

A GPU sums a product over tiles, and may split the inner dimension into parts that are summed last.
Which way it takes depends on the shape, so that a packed row and a single sequence round apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from loracle.model.base import FrozenBase
from loracle.model.layers.lora import RoutedLinear

_linear = torch.nn.functional.linear


@dataclass(frozen=True)
class Order:
    """How the products of a pass are summed; each partial sum in fp32."""

    parts: int = 1
    """Partial sums over equal parts of the inner dimension, added one after another."""
    narrow: bool = False
    """Partial sums are rounded to the dtype of the product, as PyTorch allows on a GPU."""
    shuffled: bool = False
    """The inner dimension is permuted."""


ORDERS: dict[str, Order | None] = {
    "machine": None,
    "whole": Order(),
    "shuffled": Order(shuffled=True),
    "split-2": Order(parts=2),
    "split-4": Order(parts=4),
    "tiles-12": Order(parts=12),
    "split-2-narrow": Order(parts=2, narrow=True),
    "split-4-narrow": Order(parts=4, narrow=True),
}
"""``machine``: as this machine multiplies."""


def product(
    x: Float[Tensor, "*T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    order: Order,
) -> Float[Tensor, "*T O"]:
    """Returns x W^T + b, rounded once to the dtype of ``x``."""
    wide_x, wide_weight = x.float(), weight.float()
    if order.shuffled:
        draw = torch.Generator().manual_seed(x.shape[-1])
        columns = torch.randperm(x.shape[-1], generator=draw)
        wide_x, wide_weight = wide_x[..., columns], wide_weight[:, columns]
    factors = zip(
        wide_x.tensor_split(order.parts, -1), wide_weight.tensor_split(order.parts, -1), strict=True
    )
    total: Tensor | None = None
    for part, columns_of_weight in factors:
        found = _linear(part, columns_of_weight)
        found = found.to(x.dtype).float() if order.narrow else found
        total = found if total is None else total.add_(found)
    assert total is not None
    return (total if bias is None else total.add_(bias.float())).to(x.dtype)


@contextmanager
def summing(order: Order | None) -> Iterator[None]:
    """Makes every linear product of PyTorch sum in an order; None: as the machine does."""
    if order is None:
        yield
        return

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(x, weight, bias, order=order)

    with patch.object(torch.nn.functional, "linear", linear):
        yield


@contextmanager
def faulty(base: FrozenBase, fault: str) -> Iterator[None]:
    """Puts a fault into the default adapter of ``base``.

    Args:
        base: It has an adapter called ``default``.
        fault: ``none``; ``lost`` (no adapter); ``scale-1.1``; ``module-7`` (that one is lost);
            ``layer-7`` (all of its modules are lost); ``swap-7`` (layers 7 and 8 change places).
    """
    kind, _, number = fault.partition("-")
    layers = [module for module in base.model.modules() if isinstance(module, RoutedLinear)]
    scales = [layer.scaling["default"] for layer in layers]
    per_block = len(layers) // len(base.blocks)
    index = int(float(number or 0))
    block = slice(index * per_block, (index + 1) * per_block)
    hit = {"none": [], "module": layers[index : index + 1], "layer": layers[block]}
    for layer in hit.get(kind, [] if kind == "swap" else layers):
        layer.scaling["default"] *= float(number) if kind == "scale" else 0.0
    after = layers[block.stop : block.stop + per_block] if kind == "swap" else []
    pairs = list(zip(layers[block], after, strict=True)) if kind == "swap" else []
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling["default"] = scale


def _exchange(pairs: list[tuple[RoutedLinear, RoutedLinear]]) -> None:
    for one, other in pairs:
        for factors in ("lora_A", "lora_B"):
            mine, theirs = (getattr(layer, factors)["default"].weight for layer in (one, other))
            mine.data, theirs.data = theirs.data, mine.data
