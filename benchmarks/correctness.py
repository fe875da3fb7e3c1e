"""The device against the CPU before any clock: dropout's masks, losses, gradients, random weights.

Masks are integers and must be the same bits. Losses and gradients are compared in fp32, where only
the order of sums differs, and the losses again in the device's own 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch

import loracle
from figures import Row, block_of
from geometry import bare_tokenizer, random_examples, random_model
from loracle.engine.gradients import gradients_of
from loracle.model.base import FrozenBase
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.dropout import DropoutStream, keep_bits, threshold_of
from loracle.model.layers.fast_parts import install_fast_parts
from workload import config_of, plan_of, start_run

_CPU = torch.device("cpu")
# assumed: fp32 sums of some thousand terms in another order, through 30 layers; to be replaced by
# what the first card shows
_LOSS, _GRADIENT = 1e-5, 1e-3
# assumed: as the audit allows in 16 bits (runner/audit.py), for a few hundred tokens
_LOSS_IN_16_BITS = 1e-2
# features, probability, step
_MASKS = ((576, 0.1, 0), (1536, 0.1, 999), (11008, 0.05, 3), (33, 0.5, 1))


def compare(geometry: str, *, batch: int = 4) -> Row:
    """Returns the differences as a logged block; ``error`` names those beyond their limit."""
    device = loracle.choose_device("auto")
    dtype = loracle.choose_dtype("auto", device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        there = _step(geometry, batch=batch, device=_CPU, dtype=torch.float32)
        here = _step(geometry, batch=batch, device=device, dtype=torch.float32)
        low = _step(geometry, batch=batch, device=device, dtype=dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    found = {
        "mask_elements_that_differ": _mask_differences(device),
        "loss_relative": _relative(here["losses"], there["losses"]),
        "gradient_relative": max(
            _relative(here["gradients"][name], value) for name, value in there["gradients"].items()
        ),
        "loss_relative_in_16_bits": _relative(low["losses"], there["losses"]),
    }
    limits = dict(zip(found, (0, _LOSS, _GRADIENT, _LOSS_IN_16_BITS), strict=True))
    wrong = [
        f"{name} {found[name]:.3g} > {limits[name]:g}"
        for name in found
        if not found[name] <= limits[name]
    ]
    return block_of([], device=device, dtype=dtype) | {
        "error": "; ".join(wrong) or None,
        "checks": found,
        "limits": limits,
    }


def _mask_differences(device: torch.device) -> int:
    """Elements of masks that are not the same on both devices, of several shapes, rates, steps."""
    differ = 0
    for features, probability, step in (
        (576, 0.1, 0),
        (1536, 0.1, 999),
        (11008, 0.05, 3),
        (33, 0.5, 1),
    ):
        stream = DropoutStream(threshold_of(probability), 7, step, (0, 3), (129, 31))
        own, theirs = (
            keep_bits(
                (stream,), module="model.layers.0.mlp.down_proj", features=features, device=on
            )
            for on in (_CPU, device)
        )
        differ += int((own != theirs.cpu()).sum())
    return differ


def _step(geometry: str, *, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns losses and, in fp32, gradients of a step with dropout, from the same numbers."""
    register_packed_attention()
    model = random_model(geometry, device=_CPU, dtype=torch.float32, attention=PACKED)
    model = model.to(device, dtype).eval().requires_grad_(False)
    install_fast_parts(model)
    base = FrozenBase(model=model, tokenizer=bare_tokenizer(), device=device, dtype=dtype)
    config = config_of("train.max_steps=1", f"train.batch_size={batch}", "lora.dropout=0.1")
    examples = random_examples(geometry, count=batch, length=None)
    run = start_run(base, config=config, plan=plan_of(model, config), examples=examples)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in run.adapter.parameters.items():
            if name.endswith("lora_B"):  # zeros at first, through which no gradient reaches A
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
    (gradient,) = gradients_of(base, [run], micro_batch_tokens=512, trunk=None)
    return {
        "losses": gradient.nll.detach().double().cpu(),
        "gradients": {
            name: parameter.grad.detach().double().cpu()
            for name, parameter in run.adapter.parameters.items()
            if parameter.grad is not None and dtype == torch.float32
        },
    }


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The L2 norm of the difference over that of the reference."""
    return float((value - reference).norm() / reference.norm())
