"""FLOPs and bytes of every operation of a trace, and the time they take on a device.

Shapes come from the operations themselves, independent of models and adapters.
Source: Williams et al. 2009 "Roofline", for the time of an operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Operation:
    """The cost of one kernel."""

    flops: int
    """Floating-point operations of matrix products, two per multiply-add; 0 otherwise."""
    num_bytes: int
    """Bytes read and written."""


@dataclass(frozen=True)
class Rates:
    """Speed of a device."""

    flop_per_s: float
    """Matrix products in the base's dtype."""
    byte_per_s: float
    """Memory bandwidth, reads and writes."""
    overhead_s: float
    """Seconds per operation: its launch on a GPU, its call on a CPU."""
    overlaps: bool
    """True: the host launches while the device computes (GPU)."""
    factor: float = 1.0
    """Measured over predicted time of a calibration step."""


class Work:
    """The operations of a stretch of code, counted by cost."""

    def __init__(self) -> None:
        self.operations: Counter[Operation] = Counter()

    def add(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Counts one call of an operator, unless it only makes a view or allocates."""
        kind = _kind_of(func)
        if kind is None:
            return
        given = _tensors((*args, *kwargs.values()))
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        # Reshapes that need no copy return their input.
        made = [t for t in _tensors((result,)) if t.untyped_storage()._cdata not in storages]
        changed = [
            tensor
            for place, name in kind.written
            for tensor in _tensors((kwargs.get(name, args[place] if place < len(args) else None),))
        ]
        if made or changed:
            flops = _flops(kind.formula, args, kwargs, result) if kind.formula else 0
            moved = sum(tensor.nbytes for tensor in (*given, *made, *changed))
            self.operations[Operation(flops, moved)] += 1

    @property
    def flops(self) -> int:
        """FLOPs of all operations."""
        return sum(cost.flops * count for cost, count in self.operations.items())

    @property
    def num_bytes(self) -> int:
        """Bytes moved by all operations."""
        return sum(cost.num_bytes * count for cost, count in self.operations.items())

    def seconds(self, rates: Rates) -> float:
        """Returns the predicted time: of each operation, the longer of computing and moving."""
        busy = sum(
            count * max(cost.flops / rates.flop_per_s, cost.num_bytes / rates.byte_per_s)
            for cost, count in self.operations.items()
        )
        calls = self.operations.total() * rates.overhead_s
        return rates.factor * (max(busy, calls) if rates.overlaps else busy + calls)


@dataclass(frozen=True)
class _Kind:
    formula: Callable[..., Any] | None
    """Formula of its FLOPs; None: it multiplies no matrices."""
    written: tuple[tuple[int, str], ...]
    """Position and name of each argument that it writes to."""


def _grouped_product_flops(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of rows that each meet one of several matrices, all of one shape."""
    return 2 * rows.shape[0] * weight.shape[1] * weight.shape[2]


def _grouped_gradient_flops(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of the gradients of the rows and of the matrices."""
    return 2 * _grouped_product_flops(rows, weight)


_MORE_FLOPS: dict[str, Callable[..., int]] = {
    "transformers::grouped_mm_fallback": _grouped_product_flops,
    "transformers::grouped_mm_fallback_backward": _grouped_gradient_flops,
}
"""Formulas that PyTorch's registry does not have; those of our own operators are registered."""

_NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh")


@lru_cache(maxsize=1024)
def _kind_of(func: Any) -> _Kind | None:
    """Returns how to cost an operator; None if it never is a kernel."""
    packet = func._overloadpacket
    if packet.__name__ in _NO_KERNEL or func.is_view:
        return None
    name = packet.__name__
    # The registry has formulas for ``addmm`` but not for ``addmm_``.
    plain = getattr(torch.ops.aten, name.rstrip("_"), packet) if name.endswith("_") else packet
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    formula = flop_registry.get(plain) or _MORE_FLOPS.get(func.name().partition(".")[0])
    return _Kind(formula, written)


def _flops(
    formula: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> int:
    of_shapes = getattr(formula, "__wrapped__", None)
    if of_shapes is None or not isinstance(result, Tensor):
        return int(formula(*args, **kwargs, out_val=result))
    # PyTorch's wrapper around a formula takes ten times as long as the formula.
    shapes = [value.shape if isinstance(value, Tensor) else value for value in args]
    return int(of_shapes(*shapes, **kwargs, out_shape=result.shape))


def _tensors(tree: Iterable[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for leaf in tree:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, list | tuple):
            tensors += _tensors(leaf)
    return tensors
