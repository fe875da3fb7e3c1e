"""Causal attention within all sequences of a packed row in one launch, where PyTorch offers it.

PyTorch ships the kernel for compute capability 8.0 and above, in 16 bits; its signature changed
between releases, so it is inspected. Older GPUs process one sequence after another.

Shapes: H query heads, K key-value heads, T tokens, D head size, S sequences.
Source: torch.nn.attention.varlen (PyTorch 2.10 and later).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def attends_variable_length(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if the device has the kernel for this dtype."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8 and _kernel() is not None


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # A kernel without this argument would ignore the scale that some models set.
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


def attend_variable_length(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T D"],
    *,
    lengths: tuple[int, ...],
    ends: Int[Tensor, " ends"],
    scale: float,
    kernel: Callable[..., Any] | None = None,
) -> Float[Tensor, "1 T H D"]:
    """Returns causal attention within each of ``lengths``; tests replace PyTorch's ``kernel``.

    ``ends`` are 0 and the end of each sequence, in int32 on the device (``PackedRow.ends``).
    """
    kernel = kernel or _kernel()
    assert kernel is not None
    parameters = inspect.signature(kernel).parameters
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" not in parameters:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    options: dict[str, Any] = {"scale": scale}
    options |= {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = groups > 1
    longest = max(lengths)
    # Of a tensor[0] the gradient would be copied into zeros.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    out: Tensor = kernel(q, k, v, ends, ends, longest, longest, **options)
    return out[None]
