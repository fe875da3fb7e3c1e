"""Loads a frozen base and compares it with stock Transformers before it is used.

Shapes: N targets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loracle.data import end_ids_of
from loracle.data.packing import PackedRow, pack
from loracle.errors import ModelError
from loracle.model.base import PROBES, FrozenBase, Probe, cross_entropy
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.four_bit import four_bit_config, install_unpacked_products
from loracle.model.layers.norm import install_fast_norms
from loracle.quiet import quiet_transformers

# assumed: a larger difference between the fast head and the model's own is more than rounding
_HEAD_TOLERANCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# assumed: other shapes round otherwise, a leak between sequences costs tenths of a nat or more
_PACKING_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def load_base(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trains: bool = False,
    quantization: str | None = None,
) -> FrozenBase:
    """Returns the model in ``path``, frozen, in evaluation mode, with packed attention.

    Args:
        path: A folder that stock Transformers loads (safetensors only, no remote code).
        device: The run's device.
        dtype: dtype of every weight; cast once, here.
        trains: True for full fine-tuning: weights stay in fp32, products are in ``dtype``.
        quantization: ``nf4`` packs all linear layers but the head.

    Raises:
        ModelError: If Transformers cannot load it, or it cannot be run on packed rows.
    """
    assert not (trains and quantization), "packed weights cannot train"
    register_packed_attention()
    # Weights are packed on their final device, because packed ones cannot be moved everywhere.
    packing = (
        {"quantization_config": four_bit_config(dtype), "device_map": {"": device}}
        if quantization
        else {}
    )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32 if trains else dtype,
                attn_implementation=PACKED,
                use_safetensors=True,
                trust_remote_code=False,
                **packing,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path.name}: {_why_not_loaded(error, path=path)}") from None
    ends = getattr(model.generation_config, "eos_token_id", None)
    # Otherwise Transformers would fill unset options with the model's penalties and sampling.
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model = model if quantization else model.to(device)
    model = model.eval().requires_grad_(trains)
    install_fast_norms(model)
    if quantization:
        install_unpacked_products(model)
    base = FrozenBase(
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        trains=trains,
        quantization=quantization,
        end_ids=end_ids_of(tokenizer, named=ends),
    )
    return _checked(base)


def _why_not_loaded(error: Exception, *, path: Path) -> str:
    if PACKED in error.args:
        return (
            "this architecture does not take its attention from Transformers' interface, "
            "so it cannot run on packed rows"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"Transformers cannot load this model ({reason.replace(str(path), path.name)})"


def _checked(base: FrozenBase) -> FrozenBase:
    """Returns the base with ``plain_head`` set, after comparing packed rows with single sequences.

    A model with a recurrent state or its own attention would silently mix the sequences of a row.
    Comparing numbers needs no list of architectures.
    """
    name = type(base.model).__name__
    row = pack(PROBES, device=base.device)
    try:
        with torch.inference_mode():
            packed = base.nll_from_logits(row)
            alone = torch.cat([_stock_nll(base, probe) for probe in PROBES])
    except (AttributeError, TypeError) as error:
        # Raised by models that need a mask or do not pass the lengths to their attention.
        raise ModelError(f"{name}: cannot run on packed rows ({error})") from None
    if not torch.isfinite(alone).all():
        raise ModelError(f"{name}: the untuned model gives NaN or infinity")
    gap = (packed - alone).abs().mean().item()
    if not gap <= _PACKING_TOLERANCE_NATS[base.dtype]:
        raise ModelError(
            f"{name}: sequences that share a row change each other's loss (by {gap:.2g} nats per "
            "token), as with recurrent layers or position biases; this architecture cannot be used"
        )
    return replace(base, plain_head=_has_plain_head(base, row=row, own=packed))


def _stock_nll(base: FrozenBase, probe: Probe) -> Float[Tensor, " N"]:
    ids = torch.tensor([probe.input_ids], device=base.device)
    with base.generating(()) as model:
        logits = model(input_ids=ids, use_cache=False).logits[0, probe.num_prompt - 1 : -1]
    return cross_entropy(logits, ids[0, probe.num_prompt :])


def _has_plain_head(base: FrozenBase, *, row: PackedRow, own: Float[Tensor, " N"]) -> bool:
    """Returns True if the fast head gives the model's own loss; some models cap their logits."""
    if base.model.get_decoder() is base.model:
        return False
    with torch.inference_mode():
        fast = base.token_nll(row, routes=())
    return bool((own - fast).abs().max() <= _HEAD_TOLERANCE_NATS[base.dtype])
