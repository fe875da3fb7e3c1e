"""Replaces what lies between a model's products by faster code that computes the same."""

from __future__ import annotations

import torch
from torch import nn

from loracle.model.layers.adapter_precision import multiplies_exactly
from loracle.model.layers.gate import install_fused_gates
from loracle.model.layers.norm import install_fast_norms
from loracle.model.layers.ops import has_kernels
from loracle.model.layers.rotation import install_fused_rotations


def install_fast_parts(model: nn.Module) -> tuple[str, ...]:
    """Replaces norms, gated products and rotations of a frozen model, each if it is the same.

    Returns:
        A line for a person about each kind that stays as it is because its kernel failed.
    """
    notices: list[str] = []
    for install in (install_fast_norms, install_fused_gates, install_fused_rotations):
        install(model, notice=notices.append)
    parameters = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    for device, dtype in {(p.device, p.dtype) for p in parameters if has_kernels(p.device)}:
        if not multiplies_exactly(device, dtype):
            notices.append(
                f"{device}: products of parts of fp32 numbers are not exact; adapters are scored "
                "by products in fp32, which are slower"
            )
    return tuple(notices)
