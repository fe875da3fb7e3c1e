"""The gated product of an MLP, ``silu(gate) * up``, as one kernel each way on a GPU.

Autograd of stock code keeps three tensors of the MLP's width; this keeps two. It replaces the
forward of modules that do the same between their projections, which is decided by comparing
numbers.

Shapes: F features of the MLP.
Source: Shazeer 2020 arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def gated(gate: Float[Tensor, "*T F"], up: Float[Tensor, "*T F"]) -> Float[Tensor, "*T F"]:
    """Returns ``silu(gate) * up``."""
    return nn.functional.silu(gate) * up


def fused_gated(gate: Float[Tensor, "*T F"], up: Float[Tensor, "*T F"]) -> Float[Tensor, "*T F"]:
    """Returns the result of `gated`, by one kernel."""
    out: Tensor = _FusedGate.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


class _FusedGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Float[Tensor, "*T F"], up: Float[Tensor, "*T F"]
    ) -> Float[Tensor, "*T F"]:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out: Tensor = torch.ops.loracle.silu_gate(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.ops.loracle.silu_gate_backward(grads[0].contiguous(), *ctx.saved_tensors)


def install_fused_gates(model: nn.Module, *, notice: Notice = say_nothing) -> int:
    """Replaces the forward of every MLP that is equal to the fused one; returns their number."""
    mlps = [module for module in model.modules() if _has_gate(module)]
    kinds = {(type(mlp), type(getattr(mlp, "act_fn", None))): mlp for mlp in mlps}
    same = {kind for kind, mlp in kinds.items() if _gives_the_same(mlp, notice=notice)}
    replaced = [m for m in mlps if (type(m), type(getattr(m, "act_fn", None))) in same]
    for mlp in replaced:
        mlp.forward = partial(_forward, mlp, mlp.forward)
    return len(replaced)


def _forward(mlp: Any, stock: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not has_kernels(x.device):
        # A forecast for a CPU fills a model from the meta device.
        return stock(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    fits = gate.dtype == up.dtype and gate.dtype in FUSED_DTYPES
    out: Tensor = mlp.down_proj((fused_gated if fits else gated)(gate, up))
    return out


def _has_gate(module: nn.Module) -> bool:
    weights = [getattr(getattr(module, name, None), "weight", None) for name in _PROJECTIONS]
    return all(
        isinstance(weight, Tensor) and not weight.requires_grad and has_kernels(weight.device)
        for weight in weights
    )


def _gives_the_same(mlp: Any, *, notice: Notice) -> bool:
    """Compares what happens between the projections; without numbers on a device, on the CPU."""
    weight: Tensor = mlp.gate_proj.weight
    if weight.is_meta:
        with real_numbers():
            return _fault(mlp, gated, like=torch.empty(0)) is None
    like = torch.empty(0, device=weight.device, dtype=_dtype_of(mlp))
    fault = _fault(mlp, fused_gated, like=like)
    if fault is not None and _fault(mlp, gated, like=like) is None:
        notice(f"{type(mlp).__name__}: the kernel {fault}; it is not used")
    return fault is None


def _dtype_of(mlp: nn.Module) -> torch.dtype:
    """Returns the dtype of the products, also of packed weights."""
    weight: Any = mlp.gate_proj.weight  # type: ignore[union-attr]
    state = getattr(weight, "quant_state", None)
    dtype: torch.dtype = weight.dtype if state is None else state.dtype
    return dtype


def _fault(mlp: Any, candidate: Callable[..., Tensor], *, like: Tensor) -> str | None:
    inputs = [drawn(64, 1000, like=like, seed=seed, scale=3) for seed in range(2)]

    def stock(gate: Tensor, up: Tensor) -> Tensor:
        with _projecting(mlp, gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=_same):
            out: Tensor = mlp.forward(gate)
        return out

    return disagreement(candidate, stock, inputs)


def _same(x: Tensor) -> Tensor:
    return x


@contextmanager
def _projecting(mlp: nn.Module, **forwards: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Gives the projections other forwards inside the block."""
    before = {name: vars(getattr(mlp, name)).get("forward") for name in forwards}
    for name, forward in forwards.items():
        getattr(mlp, name).forward = forward
    try:
        yield
    finally:
        for name, forward in before.items():
            projection = getattr(mlp, name)
            del projection.forward
            if forward is not None:
                projection.forward = forward
