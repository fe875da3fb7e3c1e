"""The passes between the products of a decoder layer as operators of one launch each.

They are registered with PyTorch in the namespace ``loracle``: for GPUs, where Triton runs them, and
for the meta device, so that a forecast counts one launch that reads the inputs and writes the
outputs. On a CPU they do not exist.

Shapes: H features, B sequences, T tokens, D head size.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from loracle.model.layers.compiled import is_switched_off

LONGEST_ROW = 16384
"""Features of the longest row that is normalised (assumed: one program's registers hold it)."""
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that the operators take; all tensors of a call have the same."""

_LIBRARY = torch.library.Library("loracle", "FRAGMENT")


def has_kernels(device: torch.device) -> bool:
    """Returns True where the operators run, or are traced as on a GPU."""
    if is_switched_off():
        return False
    return device.type == "meta" or (device.type == "cuda" and _has_triton())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _kernels() -> Any:
    from loracle.model.layers import kernels

    return kernels


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns ``weight * x / rms(x)`` along the last of (*, H), and 1 / rms in fp32."""
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not x.is_meta:
        _kernels().rms_norm(x, weight, epsilon, out=out, inverse=inverse)
    return out, inverse


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Returns the gradient of ``x``."""
    out = torch.empty_like(x)
    if not x.is_meta:
        _kernels().rms_norm_backward(grad, x, weight, inverse, out=out)
    return out


def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Returns ``silu(gate) * up``."""
    out = torch.empty_like(gate)
    if not gate.is_meta:
        _kernels().silu_gate(gate, up, out=out)
    return out


def _silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of ``gate`` and ``up``."""
    outs = torch.empty_like(gate), torch.empty_like(up)
    if not gate.is_meta:
        _kernels().silu_gate_backward(grad, gate, up, outs=outs)
    return outs


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns queries and keys (B, heads, T, D) rotated, or gradients rotated back.

    ``cos`` and ``sin`` are (1 or B, T, D). The outputs lie in memory token by token.
    """
    q_out, k_out = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))
    if not q.is_meta:
        _kernels().rotate(q, k, cos, sin, back=back, outs=(q_out, k_out))
    return q_out, k_out


def _parts(
    x: Tensor,
    slots: list[int],
    raised: float,
    lifted: float,
    terms: int,
    falls: float,
    dtype: torch.dtype,
) -> Tensor:
    """Returns 16-bit parts of fp32 numbers, as `adapter_precision.parts` says."""
    out = x.new_empty(len(x), x.shape[1] // terms * len(slots), dtype=dtype)
    if not x.is_meta:
        _kernels().parts(
            x, slots=slots, raised=raised, lifted=lifted, terms=terms, falls=falls, out=out
        )
    return out


def _register() -> None:
    schemas = {
        "rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)": _rms_norm,
        "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> Tensor": (
            _rms_norm_backward
        ),
        "silu_gate(Tensor gate, Tensor up) -> Tensor": _silu_gate,
        "silu_gate_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)": (
            _silu_gate_backward
        ),
        "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, *, bool back=False)"
        " -> (Tensor, Tensor)": _rotate,
        "parts(Tensor x, int[] slots, float raised, float lifted, int terms, float falls,"
        " ScalarType dtype) -> Tensor": _parts,
    }
    for schema, function in schemas.items():
        name = _LIBRARY.define(schema)
        for key in ("CUDA", "Meta"):
            _LIBRARY.impl(name, function, key)


_register()
