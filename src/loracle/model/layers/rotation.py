"""Rotary position embedding of queries and keys as one kernel each way on a GPU.

Attention modules call a function of their file, ``apply_rotary_pos_emb``. Where that function does
what Llama's does, which is decided by comparing numbers, a module's own copy of its forward calls
the kernel instead; other models of the process, stock PEFT's among them, are not changed.

    q' = q cos + half(q) sin,    half(x) = (-x2, x1) for x = (x1, x2)

Shapes: B = 1 or sequences, T tokens, D head size.
Source: Su et al. 2021 arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loracle.model.layers.agreement import (
    Notice,
    disagreement,
    drawn,
    real_numbers,
    say_nothing,
)
from loracle.model.layers.ops import FUSED_DTYPES, has_kernels

_FUNCTION = "apply_rotary_pos_emb"
Rotation = Callable[..., tuple[Tensor, ...]]


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns queries and keys (B, heads, T, D), rotated by angles (B, T, D)."""
    first, second = (
        x * cos[:, None] + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
        * sin[:, None]
        for x in (q, k)
    )  # fmt: skip
    return first, second


def fused_rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the result of `rotated`, by one kernel; the angles get no gradient."""
    out: tuple[Tensor, Tensor] = _FusedRotation.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _FusedRotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "B heads T D"],
        k: Float[Tensor, "B groups T D"],
        cos: Float[Tensor, "_ T D"],
        sin: Float[Tensor, "_ T D"],
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        out: tuple[Tensor, Tensor] = torch.ops.loracle.rotate(*_by_head(q, k), cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rotate = torch.ops.loracle.rotate
        return (*rotate(*_by_head(*grads), *ctx.saved_tensors, back=True), None, None)


def _by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors with the numbers of each head side by side."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def install_fused_rotations(model: nn.Module, *, notice: Notice = say_nothing) -> int:
    """Makes attention modules rotate by the kernel where it is the same; returns their number."""
    modules = [module for module in model.modules() if _rotates(module)]
    kinds = {type(module): module for module in modules}
    same = {kind for kind, module in kinds.items() if _gives_the_same(module, notice=notice)}
    replaced = [module for module in modules if type(module) in same]
    for module in replaced:
        fused = partial(_fused_or_stock, _stock(module))
        module.forward = MethodType(_calling(type(module).forward, fused), module)
    return len(replaced)


def _rotates(module: nn.Module) -> bool:
    forward: Any = type(module).forward
    return (
        isinstance(forward, FunctionType)
        and "forward" not in vars(module)
        and _FUNCTION in forward.__code__.co_names
        and _FUNCTION in forward.__globals__
        and any(has_kernels(p.device) and not p.requires_grad for p in module.parameters())
    )


def _stock(module: nn.Module) -> Rotation:
    forward: Any = type(module).forward
    rotation: Rotation = forward.__globals__[_FUNCTION]
    return rotation


def _calling(forward: Any, rotation: Rotation) -> FunctionType:
    """Returns a copy of a function that finds ``rotation`` where it looked for stock's."""
    found = {**forward.__globals__, _FUNCTION: rotation}
    copy = FunctionType(
        forward.__code__, found, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _fused_or_stock(
    stock: Rotation, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any
) -> tuple[Tensor, ...]:
    # A forecast for a CPU fills a model from the meta device.
    plain = (
        has_kernels(q.device)
        and not more
        and not named
        and q.ndim == k.ndim == 4
        and cos.ndim == sin.ndim == 3
    )
    if not plain or q.dtype not in FUSED_DTYPES or {k.dtype, cos.dtype, sin.dtype} != {q.dtype}:
        return stock(q, k, cos, sin, *more, **named)
    sizes = (q.shape[2], q.shape[3])
    if cos.shape != sin.shape or cos.shape[1:] != sizes or cos.shape[0] not in (1, q.shape[0]):
        return stock(q, k, cos, sin)
    return fused_rotated(q, k, cos, sin)


def _gives_the_same(module: nn.Module, *, notice: Notice) -> bool:
    """Compares numbers on the module's device; without numbers there, on the CPU."""
    parameter = next(module.parameters())
    if parameter.is_meta:
        with real_numbers():
            return _fault(module, rotated, like=torch.empty(0)) is None
    dtypes = [p.dtype for p in module.parameters() if p.dtype in FUSED_DTYPES]
    states = [getattr(p, "quant_state", None) for p in module.parameters()]
    dtypes += [state.dtype for state in states if state is not None]
    like = torch.empty(0, device=parameter.device, dtype=dtypes[0])
    fault = _fault(module, fused_rotated, like=like)
    if fault is not None and _fault(module, rotated, like=like) is None:
        notice(f"{type(module).__name__}: the kernel of its rotation {fault}; it is not used")
    return fault is None


def _fault(module: nn.Module, candidate: Rotation, *, like: Tensor) -> str | None:
    """Compares with groups, and with two halves of the angles that are not alike."""
    size = 2 * max(int(getattr(module, "head_dim", 16)) // 2, 1)
    tokens = 33
    q, k = (
        drawn(1, tokens, heads, size, like=like, seed=heads).transpose(1, 2) for heads in (6, 2)
    )
    cos, sin = (drawn(1, tokens, size, like=like, seed=seed) for seed in (3, 4))
    return disagreement(
        lambda q, k: candidate(q, k, cos, sin), lambda q, k: _stock(module)(q, k, cos, sin), [q, k]
    )
