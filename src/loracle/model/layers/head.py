"""Negative log-likelihood of targets under a frozen output head, in chunks.

The logits of a step are the largest tensor of a small model: V numbers per target. Here they are
computed in chunks, each of which gives a loss and the gradient of the hidden states and is then
discarded. The head itself is frozen, so no gradient of V x H is ever computed.

Shapes: N targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# measured (2-core CPU, V 49152): 128 to 512 rows are equally fast, fewer keep less in memory
CHUNK_ROWS = 256


def target_nll(
    hidden: Float[Tensor, "N H"],
    *,
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int64[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Returns -ln p(target) in nats for each row, in fp32 (fp64 for fp64 hidden states).

    Products are in the dtype of ``hidden``, the softmax in fp32, as Transformers does it.
    """
    nll: Tensor = _TargetNll.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return nll


def trained_target_nll(
    hidden: Float[Tensor, "N H"],
    *,
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int64[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Returns the result of `target_nll` for a head that trains too.

    Its gradient is autograd's; the logits of a chunk are recomputed for it instead of stored.
    """
    chunks = [
        checkpoint(_chunk_nll, hidden[rows], weight, bias, targets[rows], use_reentrant=False)
        for rows in (slice(k, k + CHUNK_ROWS) for k in range(0, len(hidden), CHUNK_ROWS))
    ]
    return torch.cat(chunks) if chunks else as_float(hidden).new_zeros(0)


def _chunk_nll(
    hidden: Float[Tensor, "n H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int64[Tensor, " n"],
) -> Float[Tensor, " n"]:
    logits = as_float(torch.nn.functional.linear(hidden, weight, bias))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


class _TargetNll(torch.autograd.Function):
    """The gradient of row i is (softmax_i - onehot_i) W, computed with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"],
        bias: Float[Tensor, " V"] | None,
        targets: Int64[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        keep = ctx.needs_input_grad[0]
        unit = torch.empty_like(hidden) if keep else None
        losses = []
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias)
            log_probs = as_float(logits).log_softmax(dim=1)
            index = targets[rows, None]
            losses.append(log_probs.gather(1, index).squeeze(1).neg_())
            if unit is not None:
                excess = log_probs.exp_()
                excess.scatter_add_(1, index, excess.new_full(index.shape, -1.0))
                unit[rows] = excess.to(hidden.dtype) @ weight
        ctx.save_for_backward(*([unit] if unit is not None else []))
        return torch.cat(losses) if losses else as_float(hidden).new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (unit,) = ctx.saved_tensors
        return unit * grads[0][:, None].to(unit.dtype), None, None, None


def as_float(tensor: Tensor) -> Tensor:
    """Returns 16-bit numbers as fp32, and fp32 and fp64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
