"""The linear layers of Llama, Mistral and Qwen2 from their configuration, without building a model.

Covers every model of the catalogue, so that its placements are listed in a moment and without
torch. A test compares the result with the inventory of the built model.

Source: modeling_llama.py, modeling_mistral.py, modeling_qwen2.py, huggingface/transformers@v5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.placement.inventory import Inventory, LinearModule

_ATTENTION_BIASES = {"llama": (), "mistral": (), "qwen2": ("q_proj", "k_proj", "v_proj")}
"""Projections with a bias, by model type."""
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields without parameters, or accounted for below; any other is left to Transformers.
_FIELDS = {
    *_SIZES, *_TOKEN_IDS, "model_type", "architectures", "head_dim", "max_position_embeddings",
    "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings",
}  # fmt: skip


def llama_family_inventory(architecture: Mapping[str, Any]) -> Inventory | None:
    """Returns the inventory of a Llama, Mistral or Qwen2; None for what this cannot be sure of."""
    sizes: list[Any] = [architecture.get(name) for name in _SIZES]
    if not (
        str(architecture.get("model_type")) in _ATTENTION_BIASES
        and architecture.keys() <= _FIELDS
        and all(type(size) is int and size > 0 for size in sizes)
    ):
        return None
    vocab, hidden, inner, num_layers, heads, groups = sizes
    head_size = architecture.get("head_dim", hidden // heads)
    ids = [architecture[name] for name in _TOKEN_IDS if name in architecture]
    if (
        hidden % heads
        or heads % groups
        or type(head_size) is not int
        or not all(type(token) is int and 0 <= token < vocab for token in ids)
    ):
        return None
    shapes = {
        "self_attn.q_proj": (hidden, heads * head_size),
        "self_attn.k_proj": (hidden, groups * head_size),
        "self_attn.v_proj": (hidden, groups * head_size),
        "self_attn.o_proj": (heads * head_size, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    modules = [
        LinearModule(
            name=f"model.layers.{layer}.{path}",
            kind=path.partition(".")[2],
            layer=layer,
            in_features=in_features,
            out_features=out_features,
            role="attention" if path.startswith("self_attn.") else "feed-forward",
        )
        for layer in range(num_layers)
        for path, (in_features, out_features) in shapes.items()
    ]
    biases = _ATTENTION_BIASES[architecture["model_type"]]
    num_biases = sum(module.out_features for module in modules if module.kind in biases)
    num_norms = (2 * num_layers + 1) * hidden
    num_embeddings = vocab * hidden * (1 if architecture.get("tie_word_embeddings") else 2)
    weights = sum(module.in_features * module.out_features for module in modules)
    modules.append(LinearModule("lm_head", "lm_head", None, hidden, vocab, "head"))
    return Inventory(tuple(modules), num_layers, weights + num_biases + num_norms + num_embeddings)
