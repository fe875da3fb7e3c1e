"""Presets cover what their names say, in families that name things differently."""

import pytest

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
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import PATTERNS, PRESETS, resolve_placement, select_modules
from loracle.placement.presets import counted_names


def kinds_in_layer(placement: str, family: str, *, layer: int) -> list[str]:
    inventory = inventory_from_architecture((TINY | UNUSUAL)[family])
    return [
        ".".join(module.name.split(".")[-2:])
        for module in select_modules(placement, inventory=inventory)
        if module.layer == layer
    ]


@pytest.mark.parametrize(
    ("architecture", "placement", "trainable_params"),
    [
        (LLAMA_2_7B, "all-linear", 39_976_960),
        (LLAMA_2_7B, "attention-qv", 8_388_608),
        (LLAMA_2_7B, "attention", 16_777_216),
        (LLAMA_2_7B, "feed-forward", 23_199_744),
        (MISTRAL_7B, "all-linear", 41_943_040),
        (MISTRAL_7B, "attention-qv", 6_815_744),
        (MISTRAL_7B, "attention", 13_631_488),
        (MISTRAL_7B, "feed-forward", 28_311_552),
        (LLAMA_3_8B, "all-linear", 41_943_040),
        (TINYLLAMA, "all-linear", 12_615_680),
        (LLAMA_3_2_1B, "all-linear", 11_272_192),
        (SMOLLM2_135M, "all-linear", 4_884_480),
    ],
)
def test_counts_at_rank_16_are_the_published_ones(architecture, placement, trainable_params):
    inventory = inventory_from_architecture(architecture)
    plan = resolve_placement(placement, inventory=inventory, rank=16, alpha=32)
    assert plan.trainable_params == trainable_params


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("gemma", ["self_attn.o_proj", "mlp.down_proj"]),
        ("phi", ["self_attn.dense", "mlp.fc2"]),
        ("phi3", ["self_attn.o_proj", "mlp.down_proj"]),
        ("gpt2", ["attn.c_proj", "mlp.c_proj"]),
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"]),
        ("opt", ["self_attn.out_proj", "1.fc2"]),
        ("rwkv", ["attention.output", "feed_forward.value"]),
    ],
)
def test_output_projections_are_those_that_write_the_residual_stream(family, expected):
    assert kinds_in_layer("output-projections", family, layer=1) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma", "phi", "opt"])
def test_separate_projections_are_found_by_name(family):
    assert set(kinds_in_layer("attention-qv", family, layer=1)) == {
        "self_attn.q_proj",
        "self_attn.v_proj",
    }
    assert len(kinds_in_layer("attention-qkv", family, layer=1)) == 3


@pytest.mark.parametrize(
    ("family", "fused"),
    [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("phi3", "qkv_proj")],
)
@pytest.mark.parametrize("placement", ["attention-qv", "attention-qkv"])
def test_a_fused_projection_has_no_query_alone_and_the_error_says_why(family, fused, placement):
    inventory = inventory_from_architecture((TINY | UNUSUAL)[family])
    with pytest.raises(PlacementError) as caught:
        resolve_placement(placement, inventory=inventory, rank=4, alpha=8)
    message = str(caught.value)
    assert message.startswith(f"placement '{placement}': layer 0 has no q projection")
    assert fused in message
    assert "'attention'" in message
    assert "\n" not in message


def test_the_head_is_in_lm_head_and_nowhere_else():
    inventory = inventory_from_architecture(TINY["llama"])
    assert [m.name for m in select_modules("lm-head", inventory=inventory)] == ["lm_head"]
    for placement in PRESETS:
        if placement != "lm-head":
            modules = select_modules(placement, inventory=inventory)
            assert "lm_head" not in {module.name for module in modules}


@pytest.mark.parametrize("num_layers", [3, 4, 5, 8, 32])
def test_thirds_part_the_layers_in_order_and_evenly(num_layers):
    architecture = TINY["llama"] | {"num_hidden_layers": num_layers}
    inventory = inventory_from_architecture(architecture)
    thirds = [
        sorted({module.layer for module in select_modules(name, inventory=inventory)})
        for name in ("first-third", "middle-third", "last-third")
    ]
    assert [layer for part in thirds for layer in part] == list(range(num_layers))
    sizes = [len(part) for part in thirds]
    assert max(sizes) - min(sizes) <= 1


def test_thirds_of_two_layers_are_refused():
    inventory = inventory_from_architecture(TINY["llama"] | {"num_hidden_layers": 2})
    with pytest.raises(PlacementError, match=r"'first-third': needs at least 3 layers.* has 2"):
        select_modules("first-third", inventory=inventory)


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ("first-2", {0, 1}),
        ("last-2", {4, 5}),
        ("every-2nd", {0, 2, 4}),
        ("every-3rd", {0, 3}),
        ("every-5th", {0, 5}),
        ("every-1st", set(range(6))),
        ("last-6", set(range(6))),
    ],
)
def test_counted_presets_take_all_linear_in_their_layers(placement, layers):
    inventory = inventory_from_architecture(TINY["llama"] | {"num_hidden_layers": 6})
    modules = select_modules(placement, inventory=inventory)
    assert {module.layer for module in modules} == layers
    assert len(modules) == 7 * len(layers)


@pytest.mark.parametrize("placement", ["first-0", "last-4", "every-4th", "every-0th"])
def test_a_count_beyond_the_model_names_the_valid_range(placement):
    inventory = inventory_from_architecture(TINY["llama"])
    with pytest.raises(PlacementError, match=rf"'{placement}': the model has 3 layers.* 1 to 3"):
        select_modules(placement, inventory=inventory)


def test_ordinals_read_as_english():
    ordinals = {count: counted_names(count)[2] for count in (1, 2, 3, 4, 11, 12, 13, 21, 112)}
    assert [name.removeprefix(f"every-{count}") for count, name in ordinals.items()] == [
        "st", "nd", "rd", "th", "th", "th", "th", "st", "th",
    ]  # fmt: skip


def test_a_preset_without_modules_says_what_there_is():
    inventory = inventory_from_architecture(UNUSUAL["mixtral"])
    with pytest.raises(PlacementError, match=r"'feed-forward': .* \(there are q_proj, k_proj"):
        select_modules("feed-forward", inventory=inventory)


def test_every_preset_has_a_meaning_in_one_line():
    meanings = {name: meaning for name, (meaning, _) in PRESETS.items()} | PATTERNS
    assert {"all-linear", "attention-qv", "output-projections", "last-N"} <= meanings.keys()
    assert all(meaning and "\n" not in meaning for meaning in meanings.values())
