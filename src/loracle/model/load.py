"""Loads a frozen base: whole, as it was saved, and fit for packed rows."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from loracle.data import end_ids_of
from loracle.errors import ModelError
from loracle.model.base import FrozenBase
from loracle.model.faults import first_line, model_faults
from loracle.model.guard import checked
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.fast_parts import install_fast_parts
from loracle.model.layers.four_bit import four_bit_config, install_unpacked_products
from loracle.screen import quiet_transformers
from loracle.sources.misfits import misfits
from loracle.sources.plain_weights import require_plain_folder


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
        UsageError: If Transformers cannot load it or cannot place every tensor, if its weights are
            already quantised, or if it cannot be run on packed rows.
    """
    assert not (trains and quantization), "packed weights cannot train"
    register_packed_attention()
    require_plain_folder(path, name=path.name)
    packing = {"quantization_config": four_bit_config(dtype)} if quantization else {}
    kept_dtype = torch.float32 if trains else dtype
    with _load_faults(path), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        placing = straight_to(device, packed=quantization is not None)
        model = _whole_model(path, dtype=kept_dtype, **packing, **placing)
    ends = getattr(model.generation_config, "eos_token_id", None)
    # Otherwise Transformers would fill unset options with the model's penalties and sampling.
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model = model.eval().requires_grad_(trains)
    notices = install_fast_parts(model)
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
        notices=notices,
    )
    return checked(base)


def straight_to(device: torch.device, *, packed: bool = False) -> dict[str, Any]:
    """Returns the option with which Transformers puts each tensor on the device as it reads it.

    Without it the whole model is made on the host first, in anonymous memory wherever its file has
    another dtype. Packed weights, which cannot be moved everywhere, need it on the host too.
    """
    return {"device_map": {"": device}} if packed or device.type != "cpu" else {}


def _whole_model(path: Path, **options: Any) -> PreTrainedModel:
    """Returns the model, every tensor of it from the file and every tensor of the file in it."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        attn_implementation=PACKED,
        use_safetensors=True,
        trust_remote_code=False,
        # Those of another size come with the report rather than as an exception without names.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    faults = misfits(model, report)
    if faults is not None:
        raise ModelError(f"{path.name}: weights and config.json do not fit: {faults}")
    return model


def _load_faults(path: Path) -> AbstractContextManager[None]:
    def reason(error: Exception) -> str:
        return reason_not_loaded(error).replace(str(path), path.name)

    return model_faults(f"{path.name}: Transformers cannot load this model", reason=reason)


def reason_not_loaded(error: Exception) -> str:
    """Returns why Transformers could not make a model for packed rows, in one line."""
    if PACKED in error.args:
        return (
            "this architecture does not take its attention from Transformers' interface, "
            "so it cannot run on packed rows"
        )
    return first_line(error)
