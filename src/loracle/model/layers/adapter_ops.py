"""Dropout and an adapter's narrow products as operators of PyTorch: a call is one kernel.

Registered, so that a trace over tensors without numbers sees one operation, with its shapes and
FLOPs. On a CPU there is C for the two that drop (``compiled``), on a CUDA device Triton for all
(``adapter_kernels``); ``masked`` knows where they can be called.

Shapes: T tokens, I features of what is dropped, N features of an update, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from loracle.model.layers import compiled

_DRAWN = "Tensor{q} keys, Tensor{q} thresholds, int module"
_MASKED, _MAYBE = _DRAWN.format(q=""), _DRAWN.format(q="?")
_SCHEMAS = (
    f"drop(Tensor x, {_MASKED}) -> Tensor",
    f"add_dropped(Tensor(a!) out, Tensor x, {_MASKED}) -> ()",
    f"narrow(Tensor x, Tensor factor, {_MAYBE}, Tensor? scale, Tensor? bounds) -> Tensor",
    f"widen(Tensor(a!) out, Tensor z, Tensor factor, {_MAYBE}, Tensor? scale) -> ()",
    f"outer(Tensor z, Tensor y, {_MAYBE}, Tensor? scale, bool by_feature) -> Tensor",
)


def _drop_shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _nothing(*_: Any) -> None:
    """Is the shape of what is written in place."""


def _narrow_shape(x: Tensor, factor: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], factor.shape[0])


def _outer_shape(z: Tensor, y: Tensor, *given: Any) -> Tensor:
    shape = (y.shape[1], z.shape[1]) if given[-1] else (z.shape[1], y.shape[1])
    return y.new_empty(shape, dtype=torch.float32)


def _narrow_flops(x: Any, factor: Any, *_: Any, **__: Any) -> int:
    return int(2 * x[0] * x[1] * factor[0])


def _widen_flops(out: Any, z: Any, *_: Any, **__: Any) -> int:
    return int(2 * out[0] * out[1] * z[1])


def _outer_flops(z: Any, y: Any, *_: Any, **__: Any) -> int:
    return int(2 * z[0] * z[1] * y[1])


def _drop_on_cpu(x: Tensor, *drawn: Any) -> Tensor:
    x = _with_rows(x)
    out = _drop_shape(x)
    _on_cpu("drop", x, out, drawn)
    return out


def _add_dropped_on_cpu(out: Tensor, x: Tensor, *drawn: Any) -> None:
    if out.dtype == torch.float16 or out.dtype != x.dtype or out.stride(1) != 1:
        out += _drop_on_cpu(x, *drawn)
    else:
        _on_cpu("add_dropped", _with_rows(x), out, drawn)


def _on_cpu(name: str, x: Tensor, out: Tensor, drawn: tuple[Any, ...]) -> None:
    keys, thresholds, module = drawn
    library = compiled.library()
    assert library is not None, "called where there is no compiled library"
    library.run(name, x, out, keys=keys, thresholds=thresholds, module=module)


def _with_rows(x: Tensor) -> Tensor:
    """Returns ``x`` with the features of a token side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _drop_on_cuda(x: Tensor, *drawn: Any) -> Tensor:
    from loracle.model.layers import adapter_kernels as triton

    out = _drop_shape(x)
    triton.drop(_with_rows(x), triton.Drawn(*drawn), out=out, adds=False)
    return out


def _add_dropped_on_cuda(out: Tensor, x: Tensor, *drawn: Any) -> None:
    from loracle.model.layers import adapter_kernels as triton

    assert out.stride(1) == 1
    triton.drop(_with_rows(x), triton.Drawn(*drawn), out=out, adds=True)


def _narrow_on_cuda(x: Tensor, factor: Tensor, *given: Any) -> Tensor:
    from loracle.model.layers import adapter_kernels as triton

    *drawn, scale, bounds = given
    return triton.narrow(_with_rows(x), factor, _mask(drawn), scale=scale, bounds=bounds)


def _widen_on_cuda(out: Tensor, z: Tensor, factor: Tensor, *given: Any) -> None:
    from loracle.model.layers import adapter_kernels as triton

    *drawn, scale = given
    assert out.stride(1) == 1
    triton.widen(out, z.contiguous(), factor, _mask(drawn), scale=scale)


def _outer_on_cuda(z: Tensor, y: Tensor, *given: Any) -> Tensor:
    from loracle.model.layers import adapter_kernels as triton

    *drawn, scale, by_feature = given
    y = _with_rows(y)
    return triton.outer(z.contiguous(), y, _mask(drawn), scale=scale, by_feature=by_feature)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Launches where the first tensor is, which need not be the current device."""

    def launch(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return kernel(first, *rest)

    return launch


def _mask(drawn: list[Any]) -> Any:
    from loracle.model.layers.adapter_kernels import Drawn

    return None if drawn[0] is None else Drawn(*drawn)


# name: shape of the result, on a CPU, on a CUDA device, FLOPs
_OPERATORS: dict[str, tuple[Any, Any, Any, Any]] = {
    "drop": (_drop_shape, _drop_on_cpu, _drop_on_cuda, None),
    "add_dropped": (_nothing, _add_dropped_on_cpu, _add_dropped_on_cuda, None),
    "narrow": (_narrow_shape, None, _narrow_on_cuda, _narrow_flops),
    "widen": (_nothing, None, _widen_on_cuda, _widen_flops),
    "outer": (_outer_shape, None, _outer_on_cuda, _outer_flops),
}


def _registered() -> torch.library.Library:
    library = torch.library.Library("loracle", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    for name, (shape, on_cpu, on_cuda, flops) in _OPERATORS.items():
        torch.library.register_fake(f"loracle::{name}", shape, lib=library)
        library.impl(name, _on_its_device(on_cuda), "CUDA")
        if on_cpu is not None:
            library.impl(name, on_cpu, "CPU")
        if flops is not None:
            register_flop_formula(getattr(torch.ops.loracle, name))(flops)
    return library


# The operators exist for as long as this does.
LIBRARY = _registered()
