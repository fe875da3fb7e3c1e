"""Causal attention of packed sequences in bf16 on a CPU, with a fast backward pass.

The forward pass is PyTorch's flash kernel. Its backward kernel takes about four times as long as
its forward on sequences of a few hundred tokens; batched products that recompute the probabilities
from the saved log-normaliser take less than half of that (LOG.md).

    P = exp(scale (Q K^T - lse / scale))      dV = P^T dO
    dS = P * (dO V^T - delta)                 dQ = scale dS K,  dK = scale dS^T Q

The log-normaliser ``lse`` and ``delta`` (row sums of dO * O) are subtracted inside the products,
as three extra bf16 columns that add up to the fp32 number. The products then round differences that
are near zero where P matters, instead of scores that are not.

Shapes: H query heads, K key-value heads, T tokens, D head size, C = D + 4 columns.
Source: Dao et al. 2022 arXiv:2205.14135, algorithm 4, for the recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# Three bf16 numbers carry the 24 bits of an fp32 one; the fourth column keeps the width even.
_EXTRA = 4


def attend_on_cpu(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T D"],
    *,
    lengths: tuple[int, ...],
    scale: float,
) -> Float[Tensor, "1 T H D"]:
    """Returns causal attention within each of ``lengths``, for bf16 tensors on a CPU."""
    out: Tensor = _PackedAttention.apply(query, key, value, lengths, scale)  # type: ignore[no-untyped-call]
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "1 H T D"],
        key: Float[Tensor, "1 K T D"],
        value: Float[Tensor, "1 K T D"],
        lengths: tuple[int, ...],
        scale: float,
    ) -> Float[Tensor, "1 T H D"]:
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        norms = []
        for rows in _sequences(lengths):
            part, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], key[:, :, rows], value[:, :, rows], 0.0, True, scale=scale
            )
            out[:, rows] = part.transpose(1, 2)
            norms.append(norm)
        ctx.lengths, ctx.scale = lengths, scale
        ctx.save_for_backward(query, key, value, out, torch.cat(norms, dim=-1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, out, norms = ctx.saved_tensors
        delta = (grads[0] * out).sum(dim=-1, dtype=torch.float32)[0].T
        sides = (
            _with_columns(query[0], norms[0].float() / -ctx.scale),
            _with_columns(grads[0][0].transpose(0, 1), -delta),
            _with_ones(key[0]),
            _with_ones(value[0]),
        )
        grad_q, grad_k, grad_v = (torch.empty_like(t[0]) for t in (query, key, value))
        for rows in _sequences(ctx.lengths):
            dq, dk, dv = _sequence_grads(*(side[:, rows] for side in sides), scale=ctx.scale)
            grad_q[:, rows], grad_k[:, rows], grad_v[:, rows] = dq, dk, dv
        return grad_q[None], grad_k[None], grad_v[None], None, None


def _sequence_grads(
    query: Float[Tensor, "H t C"],
    grad: Float[Tensor, "H t C"],
    key: Float[Tensor, "K t C"],
    value: Float[Tensor, "K t C"],
    *,
    scale: float,
) -> tuple[Float[Tensor, "H t D"], Float[Tensor, "K t D"], Float[Tensor, "K t D"]]:
    """Returns the gradients of one sequence; stacked query heads let a product sum over a group."""
    (heads, length, columns), groups = query.shape, key.shape[0]
    size = columns - _EXTRA
    query, grad = (t.reshape(groups, -1, columns) for t in (query, grad))
    probs = torch.bmm(query, key.transpose(1, 2)).mul_(scale).exp_()
    probs.view(heads, length, length).tril_()
    scores = torch.bmm(grad, value.transpose(1, 2)).mul_(probs)
    dv = torch.bmm(probs.transpose(1, 2), grad[..., :size])
    dk = torch.bmm(scores.transpose(1, 2), query[..., :size])
    dq = torch.bmm(scores, key[..., :size])
    return dq.mul_(scale).view(heads, length, size), dk.mul_(scale), dv


def _with_columns(
    rows: Float[Tensor, "H T D"], number: Float[Tensor, "H T"]
) -> Float[Tensor, "H T C"]:
    """Returns the rows with an fp32 number appended as bf16 columns that add up to it."""
    wide = rows.new_empty(*rows.shape[:-1], rows.shape[-1] + _EXTRA)
    wide[..., :-_EXTRA] = rows
    for column in range(-_EXTRA, -1):
        wide[..., column] = number
        number = number - wide[..., column].float()
    wide[..., -1] = 0
    return wide


def _with_ones(rows: Float[Tensor, "K T D"]) -> Float[Tensor, "K T C"]:
    wide = rows.new_ones(*rows.shape[:-1], rows.shape[-1] + _EXTRA)
    wide[..., :-_EXTRA] = rows
    return wide


def _sequences(lengths: tuple[int, ...]) -> Iterator[slice]:
    ends = list(accumulate(lengths))
    yield from (slice(end - length, end) for end, length in zip(ends, lengths, strict=True))
