"""The frozen base gives the numbers of stock Transformers, or refuses the model and says why."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from geometries import TINY, UNUSUAL
from loracle.data.packing import pack
from loracle.errors import ModelError
from loracle.model.load import load_base
from tiny import save_tiny_model, tiny_tokenizer
from tiny_engine import (
    CPU,
    FAMILIES,
    attach,
    examples_of,
    packed_nll,
    save_family,
    stock_model,
    stock_nll,
    tiny_base,
    tiny_plan,
)

SMALL = TINY["llama"] | {"initializer_range": 0.2, "pad_token_id": 0}
OWN_LOGITS = {
    "granite": SMALL | {"model_type": "granite", "logits_scaling": 4.0},
    "cohere": SMALL | {"model_type": "cohere", "logit_scale": 0.25},
    "gemma2": SMALL
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 1.0,
    },
    "llama4_text": UNUSUAL["llama4_text"] | {"initializer_range": 0.2},
}
"""Logits that are scaled or capped, or a decoder that Transformers does not hand out."""

GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
REFUSED = {
    "mamba": (
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2},
        "change each other's loss",
    ),
    "rwkv": (UNUSUAL["rwkv"], "change each other's loss"),
    "recurrent_gemma": (UNUSUAL["recurrent_gemma"], "change each other's loss"),
    "codegen": (
        GPT | {"rotary_dim": 4, "n_positions": 64},
        "change each other's loss",
    ),
    "bloom": (
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        "change each other's loss",
    ),
    "gpt_neo": (
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "does not take its attention from Transformers' interface",
    ),
    "stablelm": (SMALL, "does not receive the lengths"),
    "mpt": (
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
        "cannot run on packed rows",
    ),
    "gemma2": (SMALL | {"head_dim": 8}, "soft-capping and sinks are not supported"),
    "mistral": (SMALL | {"sliding_window": 4}, "set data.max_tokens to at most 4"),
}


def model_of(architecture: dict) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**architecture)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_equals_its_sequences_one_by_one_through_stock_transformers(family):
    examples = examples_of(7)
    row = pack(examples)
    with torch.no_grad():
        candidate = packed_nll(tiny_base(family), row)
        stock = stock_model(family)
        reference = torch.cat([stock_nll(stock, example) for example in examples])
    assert reference.std() > 0.5
    torch.testing.assert_close(candidate, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_logits_of_a_packed_row_are_stock_ones(family):
    examples = examples_of(3)
    row = pack(examples)
    with torch.no_grad():
        packed = tiny_base(family).model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            use_cache=False,
            lengths=row.lengths,
        )
        stock = stock_model(family)
        logits = [stock(input_ids=torch.tensor([e.input_ids])).logits[0] for e in examples]
    torch.testing.assert_close(packed.logits[0], torch.cat(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_its_plain_head(family, tmp_path):
    base = load_base(save_family(tmp_path, stock_model(family)), device=CPU, dtype=torch.float32)
    assert base.plain_head
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


@pytest.mark.parametrize("family", OWN_LOGITS)
def test_a_model_that_changes_its_logits_is_scored_by_its_own(family, tmp_path):
    stock = model_of(OWN_LOGITS[family])
    base = load_base(save_family(tmp_path, stock), device=CPU, dtype=torch.float32)
    assert not base.plain_head
    examples = examples_of(5)
    with torch.no_grad():
        candidate = packed_nll(base, pack(examples))
        reference = torch.cat([stock_nll(stock, example) for example in examples])
    torch.testing.assert_close(candidate, reference, rtol=0, atol=1e-5)


def test_such_a_model_takes_no_adapter_on_its_head(tmp_path):
    stock = model_of(OWN_LOGITS["granite"])
    base = load_base(save_family(tmp_path, stock), device=CPU, dtype=torch.float32)
    attach(base, tiny_plan("lm-head"))
    with pytest.raises(
        ModelError, match=r"^GraniteForCausalLM: .* leave lm_head out of lora.place"
    ):
        packed_nll(base, pack(examples_of(2)), adapter="default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_packed_rows_do_not_suit_is_refused_by_name(family, dtype, tmp_path):
    architecture, why = REFUSED[family]
    folder = save_family(tmp_path / family, model_of({**architecture, "model_type": family}))
    with pytest.raises(ModelError) as caught:
        load_base(folder, device=CPU, dtype=dtype)
    message = str(caught.value)
    assert why in message
    assert family.replace("_", "").lower() in message.replace("_", "").lower()
    assert "\n" not in message


def test_a_model_of_not_a_number_is_refused(tmp_path):
    stock = stock_model()
    stock.lm_head.weight.data[5, 0] = float("nan")
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM: the untuned model gives NaN"):
        load_base(save_family(tmp_path, stock), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_once_on_loading(dtype, tmp_path):
    base = load_base(save_tiny_model(tmp_path), device=CPU, dtype=dtype)
    assert {weight.dtype for weight in base.model.parameters()} == {dtype}
    assert base.dtype == dtype
    assert base.plain_head


def test_a_folder_without_a_model_is_named_without_its_parents(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(
        ModelError, match=r"^nothing: Transformers cannot load this model"
    ) as caught:
        load_base(tmp_path / "nothing", device=CPU, dtype=torch.float32)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_named(tmp_path):
    folder = save_tiny_model(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(40))
    with pytest.raises(ModelError, match=r"^broken: Transformers cannot load this model"):
        load_base(folder, device=CPU, dtype=torch.float32)


def test_an_unknown_architecture_is_named(tmp_path):
    folder = save_tiny_model(tmp_path / "strange")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llamma"}))
    with pytest.raises(ModelError, match=r"^strange: Transformers cannot load this model.*llamma"):
        load_base(folder, device=CPU, dtype=torch.float32)


def test_generating_lends_stock_attention_and_takes_it_back():
    base = tiny_base()
    ids = torch.tensor([[3, 4, 5, 6]])
    with base.generating(()) as model:
        lent = model(input_ids=ids).logits
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(lent, stock_model()(input_ids=ids).logits, rtol=0, atol=1e-6)
    assert base.model.config._attn_implementation == "loracle_packed"
    with pytest.raises(ZeroDivisionError), base.generating(()):
        raise ZeroDivisionError
    assert base.model.config._attn_implementation == "loracle_packed"
    assert base.router.routes is None


def test_the_digest_sees_one_bit_and_no_adapter():
    base = tiny_base("gpt2")
    before = base.weights_digest()
    names = [name for name, _ in base.frozen_weights()]
    attach(base, tiny_plan(family="gpt2"))
    assert [name for name, _ in base.frozen_weights()] == names
    assert base.weights_digest() == before == tiny_base("gpt2").weights_digest()
    bits = base.model.transformer.h[1].mlp.c_fc.base_layer.weight.data.view(torch.int32)
    bits[3, 4] ^= 1
    assert base.weights_digest() != before


def test_the_tokenizer_comes_with_the_model(tmp_path):
    base = load_base(save_tiny_model(tmp_path), device=CPU, dtype=torch.float32)
    assert base.tokenizer.eos_token_id == tiny_tokenizer().eos_token_id


def test_answers_end_with_what_the_generation_config_names(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    eos = tiny_tokenizer().eos_token_id
    file = folder / "generation_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"eos_token_id": [7, eos], "temperature": 0.5}))
    base = load_base(folder, device=CPU, dtype=torch.float32)
    assert base.end_ids == (eos, 7)
    # Nothing else of it is used, and a model that is saved still ends its answers.
    assert base.model.generation_config.to_diff_dict()["eos_token_id"] == [7, eos]
    assert base.model.generation_config.temperature is None
