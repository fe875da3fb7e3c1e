"""Models of published shapes with random weights, on which speed and memory do not depend."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from loracle.data import Example, Record
from loracle.model.base import FrozenBase
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.four_bit import install_unpacked_products
from loracle.screen import quiet_transformers

_SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": _SMOLLM2_135M
    | {
        "vocab_size": 384,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "half-smollm2": _SMOLLM2_135M
    | {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": _SMOLLM2_135M,
    "smollm2-360m": _SMOLLM2_135M
    | {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "llama-2-7b": _SMOLLM2_135M
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""Sources: the config.json of HuggingFaceTB/SmolLM2-135M and -360M and meta-llama/Llama-2-7b-hf;
``half-smollm2`` and ``tiny`` are ours."""

# Median tokens, spread of their logarithm, share of the response. assumed, so that lengths are near
# the demo's: a median of 164, a mean of 204 and 0.74 in results/demo/seed-0/data.json
_MEDIAN_TOKENS, _SPREAD, _TARGET_FRAC = 166, 0.78, 0.74
_SHORTEST, _LONGEST = 64, 512


Geometry = str | Mapping[str, Any]
"""A key of ``GEOMETRIES``, or a Transformers configuration."""


def random_model(
    geometry: Geometry,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    packing: str | None = None,
) -> PreTrainedModel:
    """Returns a model of the geometry as Transformers builds it, always with the same weights."""
    architecture = GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    config = AutoConfig.for_model(**architecture)
    with quiet_transformers(), torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return _packed_as_stock(model, dtype=dtype) if packing else model


def random_base(
    geometry: Geometry, *, device: torch.device, dtype: torch.dtype, packing: str | None = None
) -> FrozenBase:
    """Returns a frozen base of the geometry, ready for adapters; ``packing``: ``nf4`` or None."""
    register_packed_attention()
    model = random_model(geometry, device=device, dtype=dtype, attention=PACKED)
    model = model.eval().requires_grad_(False)
    if packing:
        _pack_in_place(model)
    return FrozenBase(
        model=model,
        tokenizer=bare_tokenizer(),
        device=device,
        dtype=dtype,
        quantization=packing,
    )


def _pack_in_place(model: PreTrainedModel) -> None:
    """Packs every linear layer but the head, as loading in 4 bits does."""
    from bitsandbytes.functional import quantize_4bit

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed, state = quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True
            )
            weight: Any = torch.nn.Parameter(packed, requires_grad=False)
            weight.quant_state = state
            module.weight = weight
    install_unpacked_products(model)


def _packed_as_stock(model: PreTrainedModel, *, dtype: torch.dtype) -> PreTrainedModel:
    """Packs every linear layer but the head for PEFT, as Transformers does; returns the model."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, torch.nn.Linear) or child is head:
                continue
            packed = Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=dtype
            )
            packed.weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
            setattr(parent, name, packed.to(child.weight.device))
    model.is_loaded_in_4bit = True
    return model


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that can only pad, since the examples are token ids already."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def alpaca_like_lengths(count: int, *, seed: int) -> list[int]:
    """Returns lengths distributed as in Alpaca's demo records: skewed, a mean near 207."""
    draw = random.Random(seed)
    return [
        min(_LONGEST, max(_SHORTEST, round(_MEDIAN_TOKENS * draw.lognormvariate(0.0, _SPREAD))))
        for _ in range(count)
    ]


def random_examples(
    geometry: str, *, count: int, length: int | None, seed: int = 0
) -> list[Example]:
    """Returns distinct random examples of ``length`` tokens; None: distributed as in Alpaca."""
    lengths = [length] * count if length else alpaca_like_lengths(count, seed=0)
    vocab, draw = GEOMETRIES[geometry]["vocab_size"], random.Random(seed)
    record = Record(1, "Say.", "", "Said.")
    return [
        Example(
            record=record,
            input_ids=tuple(draw.randrange(3, vocab) for _ in range(num_tokens)),
            num_prompt=max(1, round(num_tokens * (1 - _TARGET_FRAC))),
            truncated=False,
        )
        for num_tokens in lengths
    ]
