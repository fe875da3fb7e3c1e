"""Tiny wheels, sdists, models and GGUF files, an index in a folder, and a cache of their own."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from loracle.errors import SourceError


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch) -> Path:
    """An empty cache; pip sees only ``tmp_path/index``, but for tests marked real."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORACLE_CACHE", str(folder))
    if request.node.get_closest_marker("real") is None:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        (tmp_path / "index").mkdir()
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return folder


@pytest.fixture
def index(tmp_path) -> Path:
    """The folder that pip takes for the package index."""
    return tmp_path / "index"


@pytest.fixture
def offline(monkeypatch):
    """Call it, and from then on a process or a socket is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"not allowed offline: {args!r}")

    def block() -> None:
        monkeypatch.setattr(subprocess, "Popen", refuse)
        for name in ("connect", "connect_ex"):
            monkeypatch.setattr(socket.socket, name, refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    return block


@pytest.fixture
def lines() -> list[str]:
    """What was said on screen; pass ``lines.append`` as progress."""
    return []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def make_wheel(index):
    def make(members: dict[str, bytes], *, project="tiny", version="1.0") -> str:
        """Writes a wheel into the index and returns its SHA-256."""
        info = f"{project}-{version}.dist-info"
        path = index / f"{project}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return sha256(path)

    return make


# Leaves a trace if anything imports it, or asks it for metadata or a wheel.
_BACKEND = """
import os, pathlib
pathlib.Path(os.environ["TRACE"]).write_text("executed")
"""


@pytest.fixture
def trace(tmp_path, monkeypatch) -> Path:
    """The file that an sdist of ``make_sdist`` writes if its code is executed."""
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return tmp_path / "trace"


@pytest.fixture
def make_sdist(index):
    def make(members: dict[str, bytes], *, project="tiny", version="1.0") -> str:
        """Writes an sdist with a build backend of its own into the index; returns its SHA-256."""
        files = members | {
            "PKG-INFO": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode(),
            "backend.py": _BACKEND.encode(),
            "setup.py": _BACKEND.encode(),
            "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\n'
            b'backend-path = ["."]\n',
        }
        path = index / f"{project}-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as sdist:
            for name, content in files.items():
                member = tarfile.TarInfo(f"{project}-{version}/{name}")
                member.size = len(content)
                sdist.addfile(member, io.BytesIO(content))
        return sha256(path)

    return make


@pytest.fixture
def fails():
    """Runs a call that must end in a SourceError of one line, and returns the line."""

    def check(call, *args, **kwargs) -> str:
        with pytest.raises(SourceError) as caught:
            call(*args, **kwargs)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture(scope="session")
def tiny_llama():
    """A random Llama of two layers, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


@pytest.fixture
def model_folder(tmp_path, tiny_llama) -> Path:
    """A saved model: configuration, safetensors, and a file where the tokenizer would be."""
    folder = tmp_path / "model"
    tiny_llama.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, tiny_llama) -> Path:
    """The same Llama as GGUF: feed-forward matrices in Q8_0, the rest float32."""
    path = tmp_path_factory.mktemp("gguf") / "Tiny-Llama.Q8_0.gguf"
    write_gguf(path, tiny_llama)
    return path


@pytest.fixture(scope="session")
def gguf_writer():
    return write_gguf


def write_gguf(
    path: Path, model, *, pre: str | None = "gpt-2", add=lambda writer: None, keep=lambda name: True
) -> None:
    """Writes a model as GGUF; ``add`` adds keys and tensors, ``keep`` leaves tensors out."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(TINY["hidden_size"] // TINY["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TINY["vocab_size"])
    words = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *bytes_to_unicode().values(),
        "Ġt",
        "he",
        "ĊĊ",
    ]
    words += [f"<unused{number}>" for number in range(TINY["vocab_size"] - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ċ Ċ"])
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    add(writer)
    for name, weight in model.state_dict().items():
        if keep(name):
            _add_tensor(writer, name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _add_tensor(writer, name: str, weight) -> None:
    import gguf

    heads = {"q_proj": TINY["num_attention_heads"], "k_proj": TINY["num_key_value_heads"]}
    kind = name.split(".")[-2]
    if kind in heads:
        # GGUF keeps the two halves of a rotary pair side by side.
        rows, columns = weight.shape
        weight = weight.reshape(heads[kind], 2, rows // heads[kind] // 2, columns)
        weight = weight.swapaxes(1, 2).reshape(rows, columns)
    for ours, theirs in sorted(_GGUF_NAMES.items(), key=lambda pair: -len(pair[0])):
        name = name.replace(ours, theirs)
    if "ffn" in name and weight.ndim == 2:
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, weight)
