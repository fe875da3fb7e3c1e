"""What a GGUF file says and the model made from it would not do is refused, or applied."""

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from loracle.errors import SourceError
from loracle.sources.gguf import convert_gguf
from loracle.sources.gguf_keys import refused_file, unapplied_keys
from loracle.sources.gguf_tokens import unknown_tokenizer


@pytest.fixture
def convert(tmp_path, tiny_llama, gguf_writer):
    def write(*, name: str = "tiny.gguf", **changes) -> Path:
        """Converts a file with changes and returns the folder."""
        source, folder = tmp_path / name, tmp_path / "converted"
        gguf_writer(source, tiny_llama, **changes)
        folder.mkdir()
        convert_gguf(source, folder=folder, name="tiny")
        return folder

    return write


def refused(call, **changes) -> str:
    with pytest.raises(SourceError) as caught:
        call(**changes)
    message = str(caught.value)
    assert message.startswith("tiny: ")
    assert "\n" not in message
    return message


def factors(factor: float, *, theta: float = 10000.0, dim: int = 16, original: int = 8192):
    """By how much Llama 3's rope divides each frequency, from its published rule."""
    found = []
    for index in range(dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / dim)
        if wavelength < original / 4:
            found.append(1.0)
        elif wavelength > original:
            found.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"add": lambda w: w.add_uint16("split.count", 2)}, "is one of 2 parts of a model"),
        ({"name": "tiny-00001-of-00002.gguf"}, "is named as a part of a model"),
        ({"pre": None}, "no tokenizer.ggml.pre"),
        ({"pre": "default"}, "tokenizer.ggml.pre = default"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre = deepseek-llm"),
        (
            {"add": lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 3.0, np.float32))},
            "rope_freqs.weight",
        ),
        (
            {"add": lambda w: w.add_tensor("blk.0.spare.weight", np.ones((2, 2), np.float32))},
            "blk.0.spare.weight",
        ),
        ({"add": lambda w: w.add_logit_scale(4.0)}, "llama.logit_scale = 4.0"),
        ({"keep": lambda name: "layers.1." not in name}, "the model needs 9 tensors"),
        ({"keep": lambda name: name != "model.norm.weight"}, "(model.norm.weight)"),
    ],
)
def test_a_file_whose_meaning_would_be_lost_is_refused(convert, changes, says):
    assert says in refused(convert, **changes)


def test_a_file_with_neutral_keys_is_converted(convert):
    def add(writer):
        writer.add_string("llama.rope.scaling.type", "none")
        writer.add_expert_count(0)
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
        writer.add_string("quantize.imatrix.file", "calibration.dat")

    config = AutoConfig.from_pretrained(convert(add=add))
    assert config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_published_rope_factors_become_the_rope_they_came_from(convert, factor):
    folder = convert(add=lambda w: w.add_tensor("rope_freqs.weight", factors(factor)))
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", factor, 10000.0)


def test_words_of_the_vocabulary_are_whole_and_bos_stands_first_as_the_family_has_it(convert):
    tokenizer = AutoTokenizer.from_pretrained(convert(pre="llama-bpe"))
    assert tokenizer.backend_tokenizer.model.ignore_merges
    assert tokenizer("he").input_ids[0] == tokenizer.bos_token_id == 1


def test_bos_is_added_where_the_file_says_so(convert):
    tokenizer = AutoTokenizer.from_pretrained(convert(add=lambda w: w.add_add_bos_token(True)))
    assert tokenizer("he").input_ids[0] == 1


FIELDS = {"general.architecture": "llama"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "linear"),
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", 4.0),
        ("rope.scale_linear", 2.0),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.freq_base", 500000.0),
        ("rope.dimension_count", 4),
        ("attention.head_count_kv", 1),
        ("attention.head_count_kv", [2, 2, 1]),
        ("attention.layer_norm_rms_epsilon", 1e-5),
        ("attention.sliding_window", 4),
        ("attention.causal", False),
        ("attention.scale", 0.5),
        ("expert_count", 8),
        ("residual_scale", 0.2),
        ("a_key_of_tomorrow", 1),
    ],
)
def test_a_key_that_the_configuration_does_not_repeat_is_named(key, value):
    config = AutoConfig.for_model("llama", num_key_value_heads=2, rms_norm_eps=1e-6)
    assert unapplied_keys({**FIELDS, f"llama.{key}": value}, config=config) == [
        f"llama.{key} = {value}"
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 1.0),
        ("rope.scaling.original_context_length", 4096),
        ("rope.freq_base", 10000.0),
        ("rope.dimension_count", 128),
        ("attention.head_count_kv", [2, 2]),
        ("attention.layer_norm_rms_epsilon", float(np.float32(1e-6))),
        ("attention.sliding_window", 1 << 20),
        ("attention.key_length", 128),
        ("expert_count", 0),
        ("tensor_data_layout", "Meta AI original pth"),
    ],
)
def test_a_key_that_the_configuration_repeats_or_that_changes_nothing_passes(key, value):
    config = AutoConfig.for_model("llama", num_key_value_heads=2, rms_norm_eps=1e-6)
    fields = {**FIELDS, "llama.context_length": 2048, f"llama.{key}": value}
    assert unapplied_keys(fields, config=config) == []


@pytest.mark.parametrize(
    ("fields", "unknown"),
    [
        ({"model": "gpt2", "pre": "refact"}, None),
        ({"model": "llama"}, None),
        ({"model": "llama", "pre": "default"}, None),
        ({"model": "llama", "pre": "gpt-2"}, "tokenizer.ggml.pre = gpt-2"),
        ({"model": "bert"}, "tokenizer.ggml.model = bert"),
        ({"model": "gpt2", "pre": "viking"}, "tokenizer.ggml.pre = viking"),
        ({"model": "gpt2", "pre": "gpt-2", "normalizer": "nfkc"}, "tokenizer.ggml.normalizer"),
        ({"model": "llama", "eot_token_id": 3, "remove_extra_whitespaces": False}, None),
        (
            {"model": "llama", "remove_extra_whitespaces": True},
            "tokenizer.ggml.remove_extra_whitespaces = True",
        ),
    ],
)
def test_a_tokenizer_is_used_only_if_all_of_it_is_known(fields, unknown):
    found = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    assert unknown_tokenizer({**FIELDS, **found}) == unknown


def test_an_old_gpt2_needs_to_name_no_rule():
    fields = {"general.architecture": "gpt2", "tokenizer.ggml.model": "gpt2"}
    assert unknown_tokenizer(fields) is None


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_file_that_holds_no_model_is_refused(kind):
    fault = refused_file({**FIELDS, "general.type": kind}, file_name="m.gguf")
    assert fault == f"holds no model (general.type is '{kind}')"
    assert refused_file({**FIELDS, "general.type": "model"}, file_name="m.gguf") is None
