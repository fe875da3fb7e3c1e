"""A folder whose weights are not the model's, whole and plain, ends in one line that names them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from loracle.errors import LoracleError, ModelError, SourceError
from loracle.model.base import FrozenBase
from loracle.model.load import load_base
from tiny_engine import CPU, save_family, stock_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A sound folder of three families; tests change copies."""
    folder = tmp_path_factory.mktemp("sound")
    return {name: save_family(folder / name, stock_model(name)) for name in _FAMILIES}


_FAMILIES = ("llama", "qwen2", "gpt2")


def load(folder: Path, **options) -> FrozenBase:
    return load_base(folder, device=CPU, dtype=torch.float32, **options)


def refused(folder: Path, **options) -> str:
    """The one line in which loading ends."""
    with pytest.raises(LoracleError) as caught:
        load(folder, **options)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith(f"{folder.name}: ")
    assert "\n" not in message
    assert str(folder) not in message
    return message


@pytest.fixture
def changed(saved, tmp_path):
    def change(weights=dict, *, family="llama", **config) -> Path:
        """A copy with other weights, and other fields in its configuration."""
        folder = tmp_path / family
        shutil.copytree(saved[family], folder)
        path = folder / "model.safetensors"
        held = {name: value.clone() for name, value in load_file(path).items()}
        save_file(weights(held), path, metadata={"format": "pt"})
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(tree | config))
        return folder

    return change


def without(*parts: str):
    return lambda held: {k: v for k, v in held.items() if not any(part in k for part in parts)}


def renamed(prefix: str):
    return lambda held: {prefix + name: value for name, value in held.items()}


def longer(*names: str):
    return lambda held: held | {name: torch.cat([held[name], held[name][:1]]) for name in names}


_HEAD, _EMBEDDED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (renamed("_orig_mod."), ["no place for 30 tensors (_orig_mod.lm_head.weight", "needs 30"]),
        (renamed("module."), ["no place for 30 tensors (module."]),
        (without("layers.2."), ["needs 9 tensors", "model.layers.2."]),
        (without("layers.1.", "layers.2."), ["needs 18 tensors"]),
        (without("model.norm"), ["needs 1 tensor and the file has not (model.norm.weight)"]),
        (without("lm_head"), ["needs 1 tensor and the file has not (lm_head.weight)"]),
        (without("layers.0.mlp.up_proj"), ["(model.layers.0.mlp.up_proj.weight)"]),
        (lambda h: h | {"score.weight": torch.ones(2, 32)}, ["no place for 1 tensor (score.wei"]),
        (longer(_HEAD, _EMBEDDED), ["2 tensors of another size", "65 x 32, not 64 x 32"]),
        (longer("model.norm.weight"), ["(model.norm.weight: 33, not 32)"]),
    ],
)
def test_tensors_without_a_counterpart_are_named_and_counted(changed, weights, says):
    message = refused(changed(weights))
    assert all(part in message for part in says), message


def test_more_layers_than_the_configuration_speaks_of_are_refused(changed):
    message = refused(changed(num_hidden_layers=2))
    assert "no place for 9 tensors (model.layers.2.input_layernorm.weight" in message


def test_missing_biases_are_named(changed):
    message = refused(changed(without("q_proj.bias"), family="qwen2"))
    assert "needs 3 tensors" in message
    assert "model.layers.0.self_attn.q_proj.bias" in message


def test_weights_that_are_to_train_are_checked_alike(changed):
    assert "(lm_head.weight)" in refused(changed(without("lm_head")), trains=True)


def test_a_tied_head_need_not_be_stored_and_may_be_a_copy(changed):
    assert load(changed(without("lm_head"), tie_word_embeddings=True)).plain_head


def test_a_copy_of_what_is_tied_may_be_stored_and_another_head_not(changed, tmp_path):
    def copied(held):
        return held | {_HEAD: held[_EMBEDDED].clone()}

    folder = changed(copied, tie_word_embeddings=True)
    assert load(folder).plain_head
    shutil.rmtree(folder)
    message = refused(changed(tie_word_embeddings=True))
    assert "config.json ties 1 tensor and the file has other values for (lm_head.weight)" in message


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama", "model.rotary_emb.inv_freq", torch.ones(4)),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 64, 64).tril()),
    ],
)
def test_what_is_computed_and_never_learned_may_be_stored(changed, family, name, value):
    assert load(changed(lambda held: held | {name: value}, family=family))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(gptq, 4 bits)"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "(awq, 4 bits)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "(bitsandbytes)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "(fp8)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
        ({"compression_config": {"quant_method": "sparseml"}}, "(sparseml)"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "(by a method it does not name, 4 bits)"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "(hqq)"),
    ],
)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_weights_that_are_already_quantised_are_refused_by_their_method(
    changed, config, says, quantization
):
    message = refused(changed(**config), quantization=quantization)
    assert f"already quantised {says}" in message


def test_an_empty_scheme_is_none(changed):
    assert load(changed(quantization_config=None)).plain_head


def test_an_adapters_folder_is_not_taken_for_the_model_it_names(changed):
    folder = changed()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(SourceError, match="holds an adapter"):
        load(folder)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("first\nsecond"), "(first)"),
        (ZeroDivisionError(), "(ZeroDivisionError)"),
        (ImportError("needs sentencepiece"), "(needs sentencepiece)"),
        (AssertionError(), "(AssertionError)"),
        (RecursionError("deep"), "(deep)"),
        (json.JSONDecodeError("no object", "{", 1), "no object"),
    ],
)
def test_whatever_a_library_raises_is_one_line(saved, monkeypatch, error, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    assert says in refused(saved["llama"])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_no_fault_of_the_folder(saved, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load(saved["llama"])
    assert not isinstance(caught.value, ModelError)
