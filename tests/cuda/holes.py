"""python tests/cuda/holes.py OUT [--layers N] [--dtype TYPE] - a LLaMA-2-7B without its weights.

A folder that stock Transformers loads: real configuration, real names and shapes, weights in files
with holes, which read as zeros and take no disk. The tokenizer is the tests' tiny one.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from pathlib import Path

_SHARDS = 2
_TYPES = {"F16": "float16", "BF16": "bfloat16"}
# source: config.json of meta-llama/Llama-2-7b-hf
_HIDDEN, _INNER, _VOCAB = 4096, 11008, 32000


def write_holes(folder: Path, *, layers: int = 32, dtype: str = "F16") -> Path:
    """Writes the folder; ``dtype`` is that of the files."""
    from tiny import tiny_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_config(layers, dtype)), encoding="utf-8")
    shapes = _shapes(layers)
    names = sorted(shapes)
    size = math.ceil(len(names) / _SHARDS)
    places = {}
    for shard in range(_SHARDS):
        file = f"model-{shard + 1:05d}-of-{_SHARDS:05d}.safetensors"
        mine = names[shard * size : (shard + 1) * size]
        _write_shard(folder / file, {name: shapes[name] for name in mine}, dtype=dtype)
        places |= dict.fromkeys(mine, file)
    total = 2 * sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _config(layers: int, dtype: str) -> dict[str, object]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": _TYPES[dtype],
    }


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCAB, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (_VOCAB, _HIDDEN),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (_HIDDEN, _HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (_INNER, _HIDDEN)
        shapes[f"{at}.mlp.down_proj.weight"] = (_HIDDEN, _INNER)
        for name in ("input", "post_attention"):
            shapes[f"{at}.{name}_layernorm.weight"] = (_HIDDEN,)
    return shapes


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], *, dtype: str) -> None:
    """Writes a header and a hole of the tensors' size.

    Source: huggingface/safetensors README, Format.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", choices=sorted(_TYPES), default="F16")
    given = parser.parse_args()
    print(write_holes(given.out, layers=given.layers, dtype=given.dtype))
