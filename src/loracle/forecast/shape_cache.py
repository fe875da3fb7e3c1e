"""Shapes of what operations return, on the meta device, worked out once for each kind of call.

PyTorch works most of them out in Python, anew for every call; the layers of a model ask the same
questions over and over.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Kind = Literal["in place", "into", "fresh", "other"]
_Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

# In place and yet of another shape or storage.
_RESHAPES = (
    "resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swapaxes_",
)  # fmt: skip


class KnownShapes(TorchDispatchMode):
    """Answers calls whose like was made before, without making them; meta tensors only."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, tuple[bool, tuple[_Spec, ...]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind_of(func)
        if kind == "other":
            return func(*args, **kwargs)
        try:
            key = (func, _keys(args), _keys(kwargs.items()))
            known = self._known.get(key)
        except (_Unlike, TypeError):
            return func(*args, **kwargs)
        if kind == "in place":
            return args[0]
        if kind == "into" and known is not None:
            return kwargs["out"]
        if known is None:
            found = func(*args, **kwargs)
            single = isinstance(found, Tensor)
            made = (found,) if single else found
            if all(isinstance(one, Tensor) and one.is_meta for one in made):
                specs = tuple((tuple(t.shape), t.stride(), t.dtype) for t in made)
                # What is written into and had to grow is not answered for.
                if kind != "into" or _keys(kwargs.items()) == key[2]:
                    self._known[key] = (single, specs)
            return found
        single, specs = known
        outputs = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in specs
        )
        return outputs[0] if single else outputs


class _Unlike(Exception):
    """A call whose answer may depend on numbers, or is not on the meta device."""


def _keys(values: Iterable[Any]) -> tuple[Any, ...]:
    """Returns what of some arguments decides the shape of the outcome."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta or value.dtype == torch.bool:
                raise _Unlike
            found.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            found.append(_keys(value))
        else:
            # 1, 1.0 and True are equal, and promote differently.
            found.append((type(value), value))
    return tuple(found)


@lru_cache(maxsize=1024)
def _kind_of(func: Any) -> _Kind:
    schema, name = func._schema, func._overloadpacket.__name__
    takes = schema.arguments
    if not takes or not any("Tensor" in str(each.type) for each in takes) or func.is_view:
        return "other"
    if schema.is_mutable:
        first = takes[0].alias_info
        alone = sum(bool(t.alias_info and t.alias_info.is_write) for t in takes) == 1
        returns_it = len(schema.returns) == 1 and schema.returns[0].alias_info is not None
        in_place = name.endswith("_") and name not in _RESHAPES
        if alone and returns_it and [t.name for t in takes if t.is_out] == ["out"]:
            return "into"
        return "in place" if in_place and first and alone and returns_it else "other"
    if any(each.alias_info is not None for each in schema.returns):
        return "other"
    return "fresh" if all(str(each.type) == "Tensor" for each in schema.returns) else "other"
