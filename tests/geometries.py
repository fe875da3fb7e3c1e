"""Architectures of the tests: published geometries, and tiny models of each family."""

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
MISTRAL_7B = LLAMA_2_7B | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
}
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
}
TINYLLAMA = LLAMA_2_7B | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
}
LLAMA_3_2_1B = LLAMA_3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}

_TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_TINY_GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY = {
    "llama": {"model_type": "llama"} | _TINY,
    "qwen2": {"model_type": "qwen2"} | _TINY,
    "mistral": {"model_type": "mistral"} | _TINY,
    "gemma": {"model_type": "gemma", "head_dim": 8} | _TINY,
    "phi": {"model_type": "phi"} | _TINY,
    "gpt2": {"model_type": "gpt2"} | _TINY_GPT,
    "gpt_neox": {"model_type": "gpt_neox"} | _TINY,
}
"""The families that every placement is tested on."""

UNUSUAL = {
    "phi3": {"model_type": "phi3", "pad_token_id": 0} | _TINY,
    "opt": {
        "model_type": "opt",
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "falcon_h1": {"model_type": "falcon_h1"} | _TINY,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 2} | _TINY,
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    }
    | _TINY,
    "llama4_text": {"model_type": "llama4_text", "head_dim": 8, "num_local_experts": 2} | _TINY,
    "rwkv": {
        "model_type": "rwkv",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "attention_hidden_size": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "recurrent_gemma": {"model_type": "recurrent_gemma"} | _TINY | {"num_key_value_heads": 1},
}
"""Flat blocks, state-space mixers, experts, routers: where names and structure mislead."""

LATENT = _TINY | {
    "model_type": "deepseek_v2",
    "initializer_range": 0.2,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
"""Keys and values of all tokens so far are computed again at each, from what is cached."""

DEEP = {
    "llama-2-7b": LLAMA_2_7B,
    "sliding": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "dense-first": LATENT
    | {"model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3},
    "hybrid": _TINY
    | {"model_type": "qwen3_next", "num_hidden_layers": 48, "num_experts": 2, "head_dim": 8},
}
"""Many layers, of which a few kinds: other windows, experts, or mixers."""
