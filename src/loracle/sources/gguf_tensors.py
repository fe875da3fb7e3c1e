"""The tensors of a GGUF file that Transformers leaves unread, and the factors of its rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.sources.gguf_keys import head_dim

_FACTORS = "rope_freqs.weight"
# source: config.json of Llama 3.1 and 3.3, and of Llama 3.2; llama.cpp's converter turns these four
# numbers into a divisor for each frequency
_LLAMA3 = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


def unread_tensors(model: Any, tensors: Mapping[str, Any], *, architecture: str) -> list[str]:
    """Returns the tensors of a file that no tensor of the model was made from.

    ``rope_freqs.weight`` is not among them once `apply_rope_factors` has found its meaning.
    """
    from transformers.integrations.gguf import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if is_gguf_arch_supported(architecture):
        # Of these Transformers reports what it has no place for.
        return []
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    read = set(get_gguf_hf_weights_map(model, processor))
    if _FACTORS in tensors and _is_applied(model.config, tensors[_FACTORS]):
        read.add(_FACTORS)
    return sorted(name for name in tensors if not {name, name.removesuffix(".weight")} & read)


def apply_rope_factors(config: Any, tensors: Mapping[str, Any]) -> None:
    """Sets the rope of ``config`` to the published one with the file's factors, if there is one."""
    if _FACTORS not in tensors or _is_applied(config, tensors[_FACTORS]):
        return
    plain = dict(config.rope_parameters)
    for published in _LLAMA3:
        config.rope_parameters = plain | published
        if _is_applied(config, tensors[_FACTORS]):
            return
    config.rope_parameters = plain


def _is_applied(config: Any, factors: Any) -> bool:
    """Returns True if the rope of ``config`` divides its frequencies by ``factors``."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    dim = head_dim(config)
    plain = rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3") or len(plain) != len(factors):
        return False
    scaled = plain
    if kind == "llama3":
        scaled = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].double().numpy()
    return bool(np.allclose(plain / scaled, factors, rtol=1e-4))
