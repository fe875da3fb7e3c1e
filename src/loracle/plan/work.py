"""The arithmetic of a trace: what each operation multiplies and what it moves.

Shapes come from the operations themselves; nothing is known here of models or adapters.
Source: Williams et al. 2009 "Roofline", for the time of an operation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


class Work(TorchDispatchMode):
    """Counts what runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[Operation] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        # Reshapes that did not have to copy return what they were given.
        made = [t for t in _tensors(found) if t.untyped_storage()._cdata not in storages]
        changed = _tensors(
            [
                kwargs.get(taken.name, args[place] if place < len(args) else None)
                for place, taken in enumerate(func._schema.arguments)
                if taken.alias_info is not None and taken.alias_info.is_write
            ]
        )
        if (made or changed) and func._overloadpacket.__name__ not in _NO_KERNEL:
            formula = flop_registry.get(_out_of_place(func._overloadpacket))
            flops = int(formula(*args, **kwargs, out_val=found)) if formula else 0
            moved = sum(t.numel() * t.element_size() for t in (*given, *made, *changed))
            self.operations[Operation(flops, moved)] += 1
        return found

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


def _out_of_place(operation: Any) -> Any:
    """Returns ``addmm`` for ``addmm_``: formulas are kept for the one and not for the other."""
    name = operation.__name__
    return getattr(torch.ops.aten, name.rstrip("_"), operation) if name.endswith("_") else operation


_NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
