"""The arithmetic of a trace: what each operation multiplies and what it moves.

Shapes come from the operations themselves; nothing is known here of models or adapters.
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
    """One kernel."""

    flops: int
    """Of products, two per multiplication and addition; 0 of everything else."""
    num_bytes: int
    """Read and written."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    flop_per_s: float
    """In products of the base's dtype."""
    byte_per_s: float
    """Read and written."""
    overhead_s: float
    """Of every operation: its launch on a GPU, its call on a CPU."""
    overlaps: bool
    """The host launches while the device computes, as a GPU's does."""
    factor: float = 1.0
    """Measured over predicted, of a step that was measured."""


class Work:
    """Counts operations."""

    def __init__(self) -> None:
        self.operations: Counter[Operation] = Counter()

    def add(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> None:
        """Counts one operation, unless it only makes a view or takes memory.

        Args:
            func: The operator that ran.
            args: What it was given.
            kwargs: The same, by name.
            found: What it returned.
        """
        kind = _kind_of(func)
        if kind is None:
            return
        given = _tensors((*args, *kwargs.values()))
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        # Reshapes that did not have to copy return what they were given.
        made = [t for t in _tensors((found,)) if t.untyped_storage()._cdata not in storages]
        changed = [
            tensor
            for place, name in kind.written
            for tensor in _tensors((kwargs.get(name, args[place] if place < len(args) else None),))
        ]
        if made or changed:
            flops = _flops(kind.formula, args, kwargs, found) if kind.formula else 0
            moved = sum(tensor.nbytes for tensor in (*given, *made, *changed))
            self.operations[Operation(flops, moved)] += 1

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(one.flops * count for one, count in self.operations.items())

    @property
    def num_bytes(self) -> int:
        """Moved by all operations."""
        return sum(one.num_bytes * count for one, count in self.operations.items())

    def seconds(self, rates: Rates) -> float:
        """Returns how long it takes: each operation as long as the slower of its two sides."""
        busy = sum(
            count * max(one.flops / rates.flop_per_s, one.num_bytes / rates.byte_per_s)
            for one, count in self.operations.items()
        )
        calls = self.operations.total() * rates.overhead_s
        return rates.factor * (max(busy, calls) if rates.overlaps else busy + calls)


@dataclass(frozen=True)
class _Kind:
    formula: Callable[..., Any] | None
    """Of its FLOPs; None: it multiplies no matrices."""
    written: tuple[tuple[int, str], ...]
    """Place and name of each argument that it changes."""


_NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh")


@lru_cache(maxsize=1024)
def _kind_of(func: Any) -> _Kind | None:
    """Returns what is known of an operator; None if it never is a kernel."""
    packet = func._overloadpacket
    if packet.__name__ in _NO_KERNEL or func.is_view:
        return None
    name = packet.__name__
    # Formulas are kept for ``addmm`` and not for ``addmm_``.
    plain = getattr(torch.ops.aten, name.rstrip("_"), packet) if name.endswith("_") else packet
    written = tuple(
        (place, taken.name)
        for place, taken in enumerate(func._schema.arguments)
        if taken.alias_info is not None and taken.alias_info.is_write
    )
    return _Kind(flop_registry.get(plain), written)


def _flops(
    formula: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], found: Any
) -> int:
    of_shapes = getattr(formula, "__wrapped__", None)
    if of_shapes is None or not isinstance(found, Tensor):
        return int(formula(*args, **kwargs, out_val=found))
    # What PyTorch wraps around a formula of shapes takes ten times as long as the formula.
    shapes = [each.shape if isinstance(each, Tensor) else each for each in args]
    return int(of_shapes(*shapes, **kwargs, out_shape=found.shape))


def _tensors(tree: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for each in tree:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += _tensors(each)
    return found
