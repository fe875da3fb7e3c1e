"""Bytes read and written by each operation that reaches a device, by the code that asks for it.

An operation reads its tensors and writes its results and the tensors it changes; views and empty
tensors move nothing. A custom operator (``loracle::``) is one operation, whatever it does inside. A
kernel of Triton launched outside of one moves each of its tensors once.
"""

from __future__ import annotations

import collections
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MOVES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "set_")
_OURS = ("/loracle/", "/peft/", "/transformers/", "/bitsandbytes/")


class Moved(TorchDispatchMode):
    """Counts while it is entered; autograd's threads count too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()
        self.frozen_products = 0
        """Bytes of products of activations with a frozen weight, in both passes."""
        self._inside = threading.local()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._inside.operator = func.namespace not in ("aten", "prim")
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._inside.operator = False
        num_bytes = _bytes_of(func, (*args, *(kwargs or {}).values()), out)
        if num_bytes:
            self._count(num_bytes)
        if _is_frozen_product(func, args):
            self.frozen_products += num_bytes
        return out

    def _count(self, num_bytes: int) -> None:
        place = _place()
        self.num_bytes[place] += num_bytes
        self.calls[place] += 1

    @contextmanager
    def triton_too(self) -> Iterator[None]:
        """Counts launches of Triton's and inductor's kernels that no operator holds."""
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.runtime.jit import JITFunction

        real = [(of, of.run) for of in (JITFunction, CachingAutotuner)]
        for of, run in real:
            of.run = self._told(run)
        try:
            yield
        finally:
            for of, run in real:
                of.run = run

    def _told(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if not getattr(self._inside, "operator", False):
                self._count(sum(t.nbytes for t in _tensors((*args, *kwargs.values()))))
            return run(kernel, *args, **kwargs)

        return launch


def _is_frozen_product(func: Any, args: tuple[Any, ...]) -> bool:
    """An adapter's factor has fewer elements, a frozen weight of this model more."""
    sizes = [tensor.numel() for tensor in _tensors(args) if tensor.dim() >= 2]
    return "mm" in func._overloadpacket.__name__ and len(sizes) > 1 and min(sizes) >= 1 << 20


def _bytes_of(func: Any, given: tuple[Any, ...], out: Any) -> int:
    name = func._overloadpacket.__name__
    if name in _MOVES_NOTHING or func.is_view:
        return 0
    read = list(_tensors(given))
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    made = [t for t in _tensors((out,)) if t.untyped_storage()._cdata not in storages]
    changed = [
        tensor
        for argument, value in zip(func._schema.arguments, given, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors((value,))
    ]
    if not made and not changed:
        return 0  # a reshape that needed no copy
    return sum(tensor.nbytes for tensor in (*read, *made, *changed) if tensor.is_cuda)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree:
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, list | tuple):
            yield from _tensors(leaf)


def _place() -> str:
    """The innermost file of a known package on the stack: ``loracle/model/layers/norm.py``."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        for part in _OURS:
            if part in file:
                return part[1:] + file.rsplit(part, 1)[1]
        frame = frame.f_back
    return "autograd of stock code"
