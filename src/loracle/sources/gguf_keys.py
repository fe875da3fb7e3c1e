"""What a GGUF file says, against what the model made from it says.

Transformers passes over the keys and tensors of a GGUF file that it has no use for. Here every one
that changes a number is read back from the converted model, or refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")

# By key after the architecture: where the converted configuration says the same.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
# Values with which a key changes nothing. source: llama.cpp src/llama-model.cpp, its defaults
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.finetuned": (False, True),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0,),
    "pooling_type": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}


def refused_file(fields: Mapping[str, Any], *, file_name: str) -> str | None:
    """Returns why a file cannot be a whole model; None if it can.

    Args:
        fields: Its keys and values.
        file_name: Its own name.
    """
    parts = fields.get("split.count", 1)
    if parts > 1 or _PART.search(file_name):
        return (
            f"is one of {parts} parts of a model" if parts > 1 else "is named as a part of a model"
        ) + "; join them into one file (llama-gguf-split --merge)"
    kind = fields.get("general.type", "model")
    return None if kind == "model" else f"holds no model (general.type is '{kind}')"


def unapplied_keys(fields: Mapping[str, Any], *, config: Any) -> list[str]:
    """Returns ``key = value`` of what the file says and the converted configuration does not."""
    prefix = f"{fields['general.architecture']}."
    return [
        f"{key} = {_short(value)}"
        for key, value in fields.items()
        if key.startswith(prefix)
        and not _is_applied(key.removeprefix(prefix), value, config=config, fields=fields)
    ]


def _is_applied(key: str, value: Any, *, config: Any, fields: Mapping[str, Any]) -> bool:
    if value in _NEUTRAL.get(key, ()):
        return True
    if key == "rope.scaling.original_context_length":
        # It is read with a type of scaling only, and that is a key of its own.
        return True
    if key in ("rope.freq_base", "rope.freq_base_swa"):
        return _same(value, _rope_base(config, windowed=key.endswith("swa")))
    if key == "rope.dimension_count":
        return _same(value, head_dim(config) * _rotary_share(config))
    if key in ("attention.key_length", "attention.value_length"):
        return _same(value, head_dim(config))
    if key == "attention.sliding_window":
        window = getattr(config, "sliding_window", None)
        longest = fields.get(f"{fields['general.architecture']}.context_length", math.inf)
        return _same(value, window) or (window is None and value >= longest)
    stated = [getattr(config, field, None) for field in _FIELDS.get(key, ())]
    return any(_same(value, field) for field in stated)


def _same(value: Any, stated: Any) -> bool:
    """Returns True if both are one number; the file has 32 bits, or one number a layer."""
    if isinstance(value, list):
        return bool(value) and all(_same(item, stated) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return bool(value == stated)
    return isinstance(stated, int | float) and math.isclose(value, stated, rel_tol=1e-6)


def head_dim(config: Any) -> int:
    """Returns the size of an attention head, stated or derived."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def _rotary_share(config: Any) -> float:
    ropes = _ropes(config)
    rope = next((part for part in ropes.values() if isinstance(part, Mapping)), ropes)
    stated = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return float(stated or 1)


def _rope_base(config: Any, *, windowed: bool) -> float | None:
    ropes = _ropes(config)
    kind = "sliding_attention" if windowed else "full_attention"
    base: float | None = ropes.get(kind, ropes).get("rope_theta")
    return base


def _ropes(config: Any) -> Mapping[str, Any]:
    """Returns one rope, or several by the kind of attention."""
    return getattr(config, "rope_parameters", None) or {}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
