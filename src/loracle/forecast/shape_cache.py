"""Output shapes of operations on the meta device, cached by the inputs' shapes.

PyTorch derives most of them in Python, anew for every call, and the layers of a model make the same
calls many times.
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

# In place, but with another shape or storage.
_RESHAPES = (
    "resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swapaxes_",
)  # fmt: skip


class CachedShapes(TorchDispatchMode):
    """Returns the cached output of calls with inputs like before; meta tensors only."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cached: dict[Any, tuple[bool, tuple[_Spec, ...]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind_of(func)
        if kind == "other":
            return func(*args, **kwargs)
        try:
            # Products of numbers alone have the default dtype.
            key = (func, torch.get_default_dtype(), _keys(args), _keys(kwargs.items()))
            cached = self._cached.get(key)
        except (_Unlike, TypeError):
            return func(*args, **kwargs)
        if kind == "in place":
            return args[0]
        if kind == "into" and cached is not None:
            return kwargs["out"]
        if cached is None:
            result = func(*args, **kwargs)
            single = isinstance(result, Tensor)
            made = (result,) if single else result
            if all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in made):
                specs = tuple((tuple(t.shape), t.stride(), t.dtype) for t in made)
                # An output that had to grow would have to grow again.
                if kind != "into" or _keys(kwargs.items()) == key[3]:
                    self._cached[key] = (single, specs)
            return result
        single, specs = cached
        outputs = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in specs
        )
        return outputs[0] if single else outputs


class _Unlike(Exception):
    """A call whose output may depend on values, or is not on the meta device."""


def _keys(values: Iterable[Any]) -> tuple[Any, ...]:
    """Returns the properties of arguments that decide the shape of the output."""
    keys: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta or value.dtype == torch.bool:
                raise _Unlike
            keys.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            keys.append(_keys(value))
        else:
            # 1, 1.0 and True are equal, but promote differently.
            keys.append((type(value), value))
    return tuple(keys)


@lru_cache(maxsize=1024)
def _kind_of(func: Any) -> _Kind:
    schema, name = func._schema, func._overloadpacket.__name__
    arguments = schema.arguments
    if not any("Tensor" in str(argument.type) for argument in arguments) or func.is_view:
        return "other"
    if schema.is_mutable:
        first = arguments[0].alias_info
        alone = sum(bool(t.alias_info and t.alias_info.is_write) for t in arguments) == 1
        returns_it = len(schema.returns) == 1 and schema.returns[0].alias_info is not None
        in_place = name.endswith("_") and name not in _RESHAPES
        if alone and returns_it and [t.name for t in arguments if t.is_out] == ["out"]:
            return "into"
        return "in place" if in_place and first and alone and returns_it else "other"
    if any(output.alias_info is not None for output in schema.returns):
        return "other"
    return "fresh" if all(str(output.type) == "Tensor" for output in schema.returns) else "other"
