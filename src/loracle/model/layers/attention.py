"""Attention within each sequence of a packed row.

Registered with Transformers as an attention implementation, so it serves every architecture that
uses that interface. Each sequence is a separate causal call: a mask over the whole row would cost
T x T and was measured seven times slower on a CPU (LOG.md). GPUs with PyTorch's variable-length
kernel process all sequences in one launch.

Shapes: B = 1, H query heads, K key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from loracle.errors import ModelError
from loracle.model.layers.cpu_attention import attend_on_cpu
from loracle.model.layers.varlen_attention import attend_variable_length, attends_variable_length

PACKED = "loracle_packed"


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T D"],
    attention_mask: Tensor | None,  # noqa: ARG001 - the signature is Transformers'
    *,
    lengths: tuple[int, ...] | None = None,
    ends: Int[Tensor, " ends"] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 T H D"], None]:
    """Returns causal attention within each of ``lengths``, and no weights.

    ``ends`` are theirs on the device, as `PackedRow` has them.

    Raises:
        ModelError: If the model needs something unsupported: attention dropout, soft-capped
            scores, attention sinks, or a window shorter than a sequence; or if its architecture
            does not pass on the lengths.
    """
    if lengths is None:
        raise ModelError(
            f"{type(module).__name__}: does not receive the lengths of packed sequences; "
            "this architecture cannot be used"
        )
    if dropout or softcap or kwargs.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__}: attention dropout, soft-capping and sinks are not supported"
        )
    window = sliding_window or getattr(module.config, "attention_chunk_size", None)
    if window is not None and max(lengths) > window:
        raise ModelError(
            f"{type(module).__name__}: sequences of {max(lengths)} tokens exceed the model's "
            f"window of {window}; set data.max_tokens to at most {window}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _autocast(query, key, value)
    if attends_variable_length(query.device, query.dtype):
        assert ends is not None, "ends are passed on as lengths are"
        return attend_variable_length(
            query, key, value, lengths=lengths, ends=ends, scale=scale
        ), None
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return attend_on_cpu(query, key, value, lengths=lengths, scale=scale), None
    return _attend_by_sequence(query, key, value, lengths=lengths, scale=scale), None


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """Yields the tensors cast as autocast does for PyTorch's attention."""
    device = tensors[0].device.type
    on = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if on else None
    for tensor in tensors:
        yield tensor if dtype is None else tensor.to(dtype)


def _attend_by_sequence(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T D"],
    *,
    lengths: tuple[int, ...],
    scale: float,
) -> Float[Tensor, "1 T H D"]:
    """Returns the result of PyTorch's own attention, one sequence after another."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu" and not _efficient_takes_groups(query, key, value):
        # Such a GPU has only the memory-efficient kernel. Where that does not support groups,
        # PyTorch would materialise all scores.
        copies = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
        grouped = False
    split = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        for q, k, v in zip(*split, strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _efficient_takes_groups(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns True if the memory-efficient kernel of this PyTorch takes fewer keys than queries."""
    if not query.is_cuda:
        return False
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
    return torch.backends.cuda.can_use_efficient_attention(asked)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Excludes cuDNN's attention inside the block, where shapes change with every call.

    On compute capability 9.0 PyTorch prefers it, and it prepares a plan for each new shape, which
    others measured at 20 ms to 1 s (pytorch/torchtune#1652, modelscope/FunASR#3705).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def register_packed_attention() -> None:
    """Registers ``attn_implementation="loracle_packed"`` with Transformers."""
    AttentionInterface.register(PACKED, packed_attention)
