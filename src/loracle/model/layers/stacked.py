"""The routed product of many runs at once, for devices where launches cost more than arithmetic.

The factors of all runs are concatenated, so a layer takes the same number of kernels for sixteen
runs as for one. A block mask on the narrow product separates the runs:

    Z = (drop(X) [A1; A2; ...]^T) * block        out = X W^T + Z [s1 B1, s2 B2, ...]^T

The extra products grow with the sum of the ranks, R (I + O) / (I O) of the layer's own: nothing on
a GPU that waits for its launches, 44 % for eight runs of rank 16 on a 576 x 576 layer, which is why
a CPU goes run by run (``lora``).

Shapes: T tokens in the row, t of them from the first run's to the last run's, I input and O output
features, R the sum of the ranks.
Source: the block mask is what SGMV kernels do by indices, Chen et al. 2023 arXiv:2310.18547.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable

from loracle.data.packing import to_device
from loracle.model.layers.dropout import DropoutStream
from loracle.model.layers.four_bit import Weight, frozen_linear, whole
from loracle.model.layers.kept import kept
from loracle.model.layers.masked import Mask
from loracle.model.layers.routing import Route


def stacked_product(x: Float[Tensor, "T I"], *rest: Any) -> Float[Tensor, "T O"]:
    """Returns the result of ``lora.routed_product`` for routes in the order of their tokens."""
    out: Tensor = _StackedProduct.apply(x, *rest)  # type: ignore[no-untyped-call]
    return out


class _StackedProduct(torch.autograd.Function):
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
        block = _block(bounds, ranks, x.device, x.dtype)
        scale = column_scales(routes, scales, ranks, x.device)
        a = torch.cat(factors[::2]).to(x.dtype)
        b = (torch.cat(factors[1::2], dim=1) * scale).to(x.dtype)
        mask = mask_of(routes, bounds, module)
        z = (mask.drop(x[rows]) @ a.T).mul_(block)
        out[rows].addmm_(z, b.T)
        ctx.streams, ctx.module, ctx.rows, ctx.ranks = mask.streams, module, rows, ranks
        ctx.factor_dtype = factors[0].dtype
        ctx.weight = weight
        ctx.save_for_backward(x, a, b, z, block, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, a, b, z, block, scale = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ whole(ctx.weight, grads[0].dtype)
        grad_out, inputs = grads[0][ctx.rows], x[ctx.rows]
        grad_z = (grad_out @ b).mul_(block)
        mask = Mask(ctx.streams, ctx.module)
        if grad_x is not None:
            mask.add_dropped(grad_x[ctx.rows], grad_z @ a)
        grad_a = (grad_z.T @ mask.drop(inputs)).to(ctx.factor_dtype).split(ctx.ranks)
        grad_b = ((grad_out.T @ z).to(ctx.factor_dtype) * scale).split(ctx.ranks, dim=1)
        grad_factors = (grad for pair in zip(grad_a, grad_b, strict=True) for grad in pair)
        return (grad_x, None, None, None, None, None, *grad_factors)


Bounds = tuple[tuple[int, int], ...]
"""First token, and one past the last, of each run."""


def bounds_of(routes: Sequence[Route], num_tokens: int) -> Bounds:
    """Returns where each run's tokens are; they must follow each other."""
    bounds = tuple((r.start, num_tokens if r.stop is None else r.stop) for r in routes)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(bounds)), "runs overlap"
    return bounds


# Used again within a pass, and by no later one; of 8 runs with 64 columns and 16k tokens, 16 MiB.
@kept(most=4)
def _block(
    bounds: Bounds,
    ranks: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "t R"]:
    """Returns 1 where a token meets its own run's columns, 0 elsewhere."""
    first = bounds[0][0]
    block = torch.zeros(bounds[-1][1] - first, sum(ranks), dtype=dtype, device=device)
    column = 0
    for (start, stop), rank in zip(bounds, ranks, strict=True):
        block[start - first : stop - first, column : column + rank] = 1
        column += rank
    return block


# Used again within a pass by every layer that the same runs adapt.
@kept(most=4)
def column_bounds(
    bounds: Bounds, ranks: tuple[int, ...], device: torch.device
) -> Int32[Tensor, "t 2"]:
    """Returns the first column of each token's run, and one past its last; none for no run."""
    first = bounds[0][0]
    columns = torch.zeros(bounds[-1][1] - first, 2, dtype=torch.int32)
    column = 0
    for (start, stop), rank in zip(bounds, ranks, strict=True):
        columns[start - first : stop - first] = torch.tensor((column, column + rank))
        column += rank
    return to_device(columns, device=device)


def column_scales(
    routes: Sequence[Route],
    scales: Sequence[float],
    ranks: tuple[int, ...],
    device: torch.device,
) -> Float[Tensor, " R"]:
    """Returns what each column of the narrow product is multiplied by."""
    with_dropout = tuple(
        scale * (route.dropout.scale if route.dropout else 1.0)
        for route, scale in zip(routes, scales, strict=True)
    )
    return _repeated(with_dropout, ranks, device)


@kept(most=64)
def _repeated(
    numbers: tuple[float, ...], ranks: tuple[int, ...], device: torch.device
) -> Float[Tensor, " R"]:
    columns = [number for number, rank in zip(numbers, ranks, strict=True) for _ in range(rank)]
    return to_device(torch.tensor(columns), device=device)


def mask_of(routes: Sequence[Route], bounds: Bounds, module: str) -> Mask:
    """Returns the mask of all tokens from the first run to the last."""
    if not any(route.dropout for route in routes):
        return Mask((), module)
    streams, end = [], bounds[0][0]
    for route, (start, stop) in zip(routes, bounds, strict=True):
        if start > end:
            streams.append(DropoutStream.keeping(start - end))
        if stop > start:
            streams.append(route.dropout or DropoutStream.keeping(stop - start))
        end = stop
    return Mask(tuple(streams), module)
