"""The inventory finds by structure what PEFT finds, in every family, and counts exactly."""

import time

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from transformers import AutoConfig, AutoModelForCausalLM

from geometries import (
    LLAMA_2_7B,
    LLAMA_3_2_1B,
    LLAMA_3_8B,
    MISTRAL_7B,
    SMOLLM2_135M,
    TINY,
    TINYLLAMA,
    UNUSUAL,
)
from loracle.errors import ModelError
from loracle.model.inventory import inventory_from_architecture, inventory_of
from loracle.placement import Inventory
from loracle.placement.llama_family import llama_family_inventory
from loracle.sources import catalog


def tiny_model(architecture: dict) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))


def roles(inventory: Inventory, *, layer: int) -> dict[str, str]:
    return {
        ".".join(module.name.split(".")[-2:]): module.role
        for module in inventory.modules
        if module.layer == layer
    }


# PEFT refuses the output projection of Mamba mixers, and in two families of experts it rewrites
# the names of linear layers into parameters of the experts: no all-linear to compare with.
PEFT_REFUSES_OR_REWRITES = ("falcon_h1", "mixtral", "qwen2_moe")


@pytest.mark.parametrize(
    "family", [name for name in (*TINY, *UNUSUAL) if name not in PEFT_REFUSES_OR_REWRITES]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_all_but_the_head_is_what_peft_adapts_as_all_linear(family):
    model = tiny_model((TINY | UNUSUAL)[family])
    inventory = inventory_of(model)
    inject_adapter_in_model(LoraConfig(r=1, target_modules="all-linear"), model)
    adapted = {
        name
        for name, module in model.named_modules()
        # Llama 4's router is a linear layer that returns two things; an adapter there fails.
        if isinstance(module, LoraLayer) and not name.endswith("router")
    }
    assert {module.name for module in inventory.modules if module.role != "head"} == adapted


@pytest.mark.parametrize("family", PEFT_REFUSES_OR_REWRITES)
def test_all_but_the_head_is_what_peft_lists_as_all_linear(family):
    model = tiny_model(UNUSUAL[family])
    config = LoraConfig(target_modules="all-linear")
    listed = _maybe_include_all_linear_layers(config, model).target_modules
    inventory = inventory_of(model)
    assert {module.name for module in inventory.modules if module.role != "head"} == listed


@pytest.mark.parametrize("family", TINY)
def test_every_block_has_attention_and_feed_forward_and_the_head_is_outside(family):
    inventory = inventory_from_architecture(TINY[family])
    assert inventory.num_layers == 3
    for layer in range(3):
        assert set(roles(inventory, layer=layer).values()) == {"attention", "feed-forward"}
    (head,) = inventory.with_role("head")
    assert (head.layer, head.in_features, head.out_features) == (None, 32, 64)


@pytest.mark.parametrize("family", [*TINY, *UNUSUAL])
def test_shapes_and_count_are_those_of_the_real_model(family):
    architecture = (TINY | UNUSUAL)[family]
    model = tiny_model(architecture)
    inventory = inventory_from_architecture(architecture)
    assert inventory == inventory_of(model)
    assert inventory.total_params == model.num_parameters()
    for module in inventory.modules:
        stored = tuple(model.get_submodule(module.name).weight.shape)
        shape = (module.out_features, module.in_features)
        assert stored == (shape[::-1] if module.fan_in_fan_out else shape)


@pytest.mark.parametrize("key", catalog().models)
def test_a_catalogue_models_inventory_needs_no_torch_and_equals_the_built_models(key):
    architecture = catalog().models[key].architecture
    with torch.device("meta"):
        model = tiny_model(architecture)
    assert llama_family_inventory(architecture) == inventory_of(model)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"model_type": "gemma"},
        {"head_dim": None},
        {"hidden_size": 30},
        {"num_key_value_heads": 3},
        {"pad_token_id": 64},
        {"num_hidden_layers": 0},
        {"vocab_size": "64"},
    ],
)
def test_what_the_llama_family_does_not_cover_is_left_to_transformers(change):
    assert llama_family_inventory(TINY["llama"]) is not None
    assert llama_family_inventory(TINY["llama"] | change) is None


def test_only_conv1d_stores_its_weight_transposed():
    gpt2 = inventory_from_architecture(TINY["gpt2"])
    assert {m.kind for m in gpt2.modules if m.fan_in_fan_out} == {"c_attn", "c_proj", "c_fc"}
    llama = inventory_from_architecture(TINY["llama"])
    assert not any(module.fan_in_fan_out for module in llama.modules)


def test_fused_and_conv_attention_is_attention():
    assert roles(inventory_from_architecture(TINY["gpt2"]), layer=2) == {
        "attn.c_attn": "attention",
        "attn.c_proj": "attention",
        "mlp.c_fc": "feed-forward",
        "mlp.c_proj": "feed-forward",
    }
    neox = roles(inventory_from_architecture(TINY["gpt_neox"]), layer=1)
    assert neox["attention.query_key_value"] == neox["attention.dense"] == "attention"


def test_projections_that_sit_in_the_block_itself_are_feed_forward():
    opt = inventory_from_architecture(UNUSUAL["opt"])
    assert roles(opt, layer=0)["0.fc1"] == roles(opt, layer=0)["0.fc2"] == "feed-forward"
    outside = {module.kind: module.role for module in opt.modules if module.layer is None}
    assert outside == {"project_out": "other", "project_in": "other", "lm_head": "head"}


def test_state_space_mixers_are_neither_attention_nor_feed_forward():
    hybrid = roles(inventory_from_architecture(UNUSUAL["falcon_h1"]), layer=0)
    assert hybrid["mamba.in_proj"] == "other"
    assert hybrid["self_attn.q_proj"] == "attention"
    assert hybrid["feed_forward.down_proj"] == "feed-forward"
    recurrent = inventory_from_architecture(UNUSUAL["recurrent_gemma"])
    assert roles(recurrent, layer=0)["temporal_block.linear_x"] == "other"
    assert roles(recurrent, layer=2)["temporal_block.q_proj"] == "attention"


def test_routers_and_expert_gates_are_other():
    moe = roles(inventory_from_architecture(UNUSUAL["qwen2_moe"]), layer=0)
    assert moe["mlp.shared_expert_gate"] == "other"
    assert moe["shared_expert.gate_proj"] == "feed-forward"


def test_a_layer_that_computes_something_of_its_own_is_no_linear_layer():
    llama4 = inventory_from_architecture(UNUSUAL["llama4_text"])
    assert not any("router" in module.name for module in llama4.modules)


def test_only_what_text_runs_through_is_listed_and_blocks_are_the_decoders():
    sight = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {
        k: v for k, v in TINY["llama"].items() if k not in ("model_type", "tie_word_embeddings")
    }
    architecture = {
        "model_type": "gemma3",
        "text_config": text | {"head_dim": 8, "sliding_window": 512, "model_type": "gemma3_text"},
        "vision_config": sight,
        "mm_tokens_per_image": 4,
    }
    inventory = inventory_from_architecture(architecture)
    assert inventory.num_layers == 3
    assert {module.layer for module in inventory.modules if module.role != "head"} == {0, 1, 2}
    assert all("vision" not in module.name for module in inventory.modules)
    assert len(inventory.with_role("head")) == 1


def test_experts_held_in_a_list_belong_to_their_block():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.Linear(4, 4)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Block(), Block()])
    inventory = inventory_of(model)
    assert inventory.num_layers == 2
    assert [module.layer for module in inventory.modules] == [0] * 4 + [1] * 4
    assert roles(inventory, layer=1)["1.attention"] == "attention"
    assert roles(inventory, layer=1)["experts.2"] == "feed-forward"


@pytest.mark.parametrize(
    ("architecture", "total_params"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (MISTRAL_7B, 7_241_732_096),
        (LLAMA_3_8B, 8_030_261_248),
        (TINYLLAMA, 1_100_048_384),
        (LLAMA_3_2_1B, 1_235_814_400),
        (SMOLLM2_135M, 134_515_008),
    ],
)
def test_base_parameters_are_the_published_ones_without_a_weight(architecture, total_params):
    start = time.perf_counter()
    assert inventory_from_architecture(architecture).total_params == total_params
    assert time.perf_counter() - start < 10  # the weights alone would take longer


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    inventory_from_architecture(TINY["llama"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"hidden_size": 8}, "model_type is missing"),
        ({"model_type": "lama"}, "'lama' is unknown to Transformers; did you mean 'llama'?"),
        ({"model_type": "llama", "hidden_size": "wide"}, "'llama': no causal model"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "multiple of"),
        ({"model_type": "t5"}, "'t5': no causal model"),
        (TINY["llama"] | {"pad_token_id": 64}, "'llama': no causal model"),
        (TINY["llama"] | {"num_hidden_layers": 0}, "no list of blocks"),
    ],
)
def test_a_bad_architecture_is_one_line(architecture, message):
    with pytest.raises(ModelError) as caught:
        inventory_from_architecture(architecture)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_with_adapters_is_refused():
    model = tiny_model(TINY["llama"])
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["q_proj"]), model)
    with pytest.raises(ModelError, match="already carries adapters"):
        inventory_of(model)
