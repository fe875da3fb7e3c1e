"""The routed product on a device with kernels of our own, one run or many at once.

Beside the frozen product and its gradient, each narrow product is one kernel, which drops its
input, reads the factors as they are stored, scales and adds in place. A run's columns of the narrow
product are kept apart by each token's bounds:

    Z = drop(X) [A1; A2; ...]^T within bounds        out = X W^T + Z [s1 B1, s2 B2, ...]^T

Shapes: T tokens in the row, t of them from the first run's to the last run's, I input and O output
features, R the sum of the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from loracle.model.layers.four_bit import Weight, frozen_linear, whole
from loracle.model.layers.masked import Mask, narrow, outer, widen_
from loracle.model.layers.routing import Route
from loracle.model.layers.stacked import bounds_of, column_bounds, column_scales, mask_of


def fused_product(x: Float[Tensor, "T I"], *rest: Any) -> Float[Tensor, "T O"]:
    """Returns the result of ``lora.routed_product`` for one or more routes in order."""
    out: Tensor = _FusedProduct.apply(x, *rest)  # type: ignore[no-untyped-call]
    return out


class _FusedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "T I"],
        weight: Weight,
        bias: Float[Tensor, " O"] | None,
        module: str,
        routes: tuple[Route, ...],
        scales: tuple[float, ...],
        *factors: Float[Tensor, ...],
    ) -> Float[Tensor, "T O"]:
        out = frozen_linear(x, weight, bias)
        bounds = bounds_of(routes, len(x))
        rows = slice(bounds[0][0], bounds[-1][1])
        ranks = tuple(len(a) for a in factors[::2])
        mask = mask_of(routes, bounds, module)
        columns = column_bounds(bounds, ranks, x.device) if len(routes) > 1 else None
        scale = column_scales(routes, scales, ranks, x.device)
        a, b = _together(factors)
        z = narrow(x[rows], a, mask=mask, bounds=columns)
        widen_(out[rows], z, b.T, scale=scale)
        ctx.weight, ctx.rows, ctx.ranks = weight, rows, ranks
        ctx.streams, ctx.module, ctx.columns, ctx.scale = mask.streams, module, columns, scale
        ctx.save_for_backward(x, z, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, z, *factors = ctx.saved_tensors
        a, b = _together(factors)
        mask, rows = Mask(ctx.streams, ctx.module), ctx.rows
        grad_x = grad @ whole(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_z = narrow(grad[rows], b.T, scale=ctx.scale, bounds=ctx.columns)
        if grad_x is not None:
            widen_(grad_x[rows], grad_z, a, mask=mask)
        grad_a = outer(grad_z, x[rows], mask=mask).split(ctx.ranks)
        grad_b = outer(z, grad[rows], scale=ctx.scale, by_feature=True).split(ctx.ranks, dim=1)
        grad_factors = (
            made.to(factor.dtype)
            for made, factor in zip(
                (grad for pair in zip(grad_a, grad_b, strict=True) for grad in pair),
                factors,
                strict=True,
            )
        )
        return (grad_x, None, None, None, None, None, *grad_factors)


def _together(factors: Any) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """Returns the factors of all runs, one below and one beside the other."""
    if len(factors) == 2:
        return factors[0], factors[1]
    return torch.cat(factors[::2]), torch.cat(factors[1::2], dim=1)
