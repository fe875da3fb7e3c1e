"""RMSNorm with a hand-written gradient that saves its 16-bit input and one number per token.

Autograd saves the input in fp32 and differentiates every step of it. This one replaces norms that
compute the same as Llama's, which is decided by comparing numbers, not by a list of names. On a GPU
it is one kernel each way (`ops`), with and without a gradient; on a CPU several passes, and stock
code where there is no gradient.

    y = w * x / rms(x),    rms(x) = sqrt(mean(x^2) + eps)

Shapes: T tokens, H features.
Source: Zhang, Sennrich 2019 arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loracle.model.layers.agreement import Notice, disagreement, drawn, say_nothing
from loracle.model.layers.head import as_float
from loracle.model.layers.ops import FUSED_DTYPES, LONGEST_ROW, has_kernels

# assumed: the reciprocal root may differ in its last bits, so a few 16-bit results round
# differently; a norm of another kind (an offset weight, another order of casts) differs far more
_LARGEST_SHARE_ROUNDED_OTHERWISE = 0.001
_TOLERANCE = 1e-5


def rms_norm(
    x: Float[Tensor, "*T H"], *, weight: Float[Tensor, " H"], epsilon: float
) -> Float[Tensor, "*T H"]:
    """Returns the normalised input, computed in fp32 and rounded once before the weight."""
    out: Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*T H"], weight: Float[Tensor, " H"], epsilon: float
    ) -> Float[Tensor, "*T H"]:
        wide = as_float(x)
        # A norm is one pass over x; a mean of squares would materialise the squares.
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (wide * inverse).to(x.dtype).mul_(weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        direction = as_float(x) * inverse
        grad = as_float(grads[0] * weight)
        along = torch.linalg.vecdot(grad, direction)[..., None].div_(-x.shape[-1])
        return grad.addcmul(direction, along).mul_(inverse).to(x.dtype), None, None


def fused_rms_norm(
    x: Float[Tensor, "*T H"], *, weight: Float[Tensor, " H"], epsilon: float
) -> Float[Tensor, "*T H"]:
    """Returns the result of `rms_norm`, by one kernel."""
    out: Tensor = _FusedRmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


class _FusedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*T H"], weight: Float[Tensor, " H"], epsilon: float
    ) -> Float[Tensor, "*T H"]:
        x = x.contiguous()
        out, inverse = torch.ops.loracle.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = out
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_x = torch.ops.loracle.rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return grad_x, None, None


def install_fast_norms(model: nn.Module, *, notice: Notice = say_nothing) -> int:
    """Replaces the forward of every frozen RMSNorm equal to this one; returns their number.

    ``notice`` takes a line about each kind that is left as it is though a kernel was tried.
    """
    norms: list[Any] = [module for module in model.modules() if _looks_like_rms_norm(module)]
    kinds = {(type(norm), norm.weight.shape): norm for norm in norms}
    forwards = {kind: _replacement(norm, notice=notice) for kind, norm in kinds.items()}
    count = 0
    for norm in norms:
        forward = forwards[type(norm), norm.weight.shape]
        if forward is not None:
            norm.forward = partial(forward, norm, norm.forward)
            count += 1
    return count


def _replacement(norm: Any, *, notice: Notice) -> Callable[..., Tensor] | None:
    """Returns the fastest forward that gives the same as the norm's own; None if none does."""
    weight: Tensor = norm.weight
    if not _gives_the_same(norm):
        return None
    if not has_kernels(weight.device) or not _fits_kernel(weight):
        return _forward
    fused = partial(fused_rms_norm, weight=weight, epsilon=_epsilon(norm))
    fault = disagreement(fused, norm, [drawn(64, len(weight), like=weight, scale=3)])
    if fault is None:
        return _fused_forward
    notice(f"{type(norm).__name__}: the kernel {fault}; it is not used")
    return _forward


def _fits_kernel(weight: Float[Tensor, " H"]) -> bool:
    return len(weight) <= LONGEST_ROW and weight.dtype in FUSED_DTYPES


def _fused_forward(norm: Any, stock: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not has_kernels(x.device) or x.dtype != norm.weight.dtype:
        # A forecast for a CPU fills a model from the meta device.
        return _forward(norm, stock, x)
    return fused_rms_norm(x, weight=norm.weight, epsilon=_epsilon(norm))


def _forward(norm: Any, stock: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Uses the model's own norm where there is no gradient."""
    if not torch.is_grad_enabled():
        return stock(x)
    return rms_norm(x, weight=norm.weight, epsilon=_epsilon(norm))


def _looks_like_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and not weight.requires_grad
        and not list(module.children())
        and type(module).__name__.endswith("RMSNorm")
        and isinstance(_epsilon(module), float)
    )


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _gives_the_same(norm: Any) -> bool:
    weight: Tensor = norm.weight
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, len(weight), generator=draw).to(weight.device, weight.dtype) * 3
    candidate, reference = rms_norm(x, weight=weight, epsilon=_epsilon(norm)), norm(x)
    if candidate.dtype != reference.dtype:
        return False
    if weight.dtype in (torch.float32, torch.float64):
        return torch.allclose(candidate, reference, rtol=_TOLERANCE, atol=0)
    return bool((candidate != reference).float().mean() <= _LARGEST_SHARE_ROUNDED_OTHERWISE)
