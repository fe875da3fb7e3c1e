"""The placements screen: right numbers, nothing cut off at 80 columns."""

import io

import pytest
from rich.console import Console

from geometries import LLAMA_2_7B, SMOLLM2_135M, TINY, UNUSUAL
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import Inventory, LinearModule
from loracle.report.terminal.placements import placements_table

DEEPSEEK_V3 = {"model_type": "deepseek_v3", "num_hidden_layers": 6}
GPT_NEOX_20B = {"model_type": "gpt_neox"}


def screen(inventory: Inventory, *, rank: int = 16, alpha: float = 32) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(placements_table(inventory, rank=rank, alpha=alpha, model_name="the-model"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, *, starts: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [starts])


def test_the_numbers_of_llama_2_7b():
    text = screen(inventory_from_architecture(LLAMA_2_7B))
    assert text.startswith("the-model: 6,738,415,616 parameters, 32 layers\n")
    assert "rank 16, alpha 32" in text
    assert row(text, starts="down_proj") == [
        "down_proj", "11,008", "x", "4,096", "0-31", "32", "241,664", "7,733,248",
    ]  # fmt: skip
    assert row(text, starts="all-linear") == ["all-linear", "224", "39,976,960", "0.593", "152.5"]
    assert row(text, starts="attention-qv") == ["attention-qv", "64", "8,388,608", "0.124", "32.0"]
    assert row(text, starts="last-16") == ["last-16", "112", "19,988,480", "0.297", "76.2"]
    assert row(text, starts="lm_head")[1:6] == ["4,096", "x", "32,000", "-", "1"]


def test_counts_follow_the_rank():
    text = screen(inventory_from_architecture(SMOLLM2_135M), rank=8)
    assert row(text, starts="all-linear")[2] == "2,442,240"
    assert row(text, starts="q_proj")[-1] == "276,480"


@pytest.mark.parametrize(
    "architecture",
    [LLAMA_2_7B, DEEPSEEK_V3, GPT_NEOX_20B, *TINY.values(), *UNUSUAL.values()],
    ids=lambda architecture: architecture["model_type"],
)
def test_nothing_is_cut_off_or_wider_than_80_columns(architecture):
    text = screen(inventory_from_architecture(architecture))
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_preset_the_model_lacks_is_not_available_and_says_why_once():
    text = screen(inventory_from_architecture(TINY["gpt2"]))
    assert row(text, starts="attention-qv") == ["attention-qv", *["n/a"] * 4]
    flat = " ".join(text.split())
    assert flat.count("so q, k and v are fused or named otherwise") == 1
    assert "n/a attention-qv, attention-qkv: layer 0 has no q projection" in flat


def test_a_kind_with_two_meanings_is_shown_with_its_parent():
    text = screen(inventory_from_architecture(TINY["gpt2"]))
    assert row(text, starts="attn.c_proj")[1:4] == ["32", "x", "32"]
    assert row(text, starts="mlp.c_proj")[1:4] == ["128", "x", "32"]


def test_the_map_shows_what_each_layer_has():
    text = screen(inventory_from_architecture(UNUSUAL["recurrent_gemma"]))
    layers = [line for line in text[text.index("\nLayers") :].splitlines() if "  " in line]
    assert "linear_x    ##." in layers
    assert "q_proj      ..#" in layers


def test_the_map_counts_several_and_wraps_deep_models():
    modules = [
        LinearModule(f"h.{layer}.experts.{index}.up", "up", layer, 4, 4, "feed-forward")
        for layer in range(95)
        for index in range({0: 3, 94: 12}.get(layer, 1))
    ]
    text = screen(Inventory(tuple(modules), 95, 10_000))
    chunks = [line for line in text.splitlines() if line.startswith("up  ")]
    assert [len(chunk.split()[1]) for chunk in chunks] == [70, 25]
    assert chunks[0].split()[1].startswith("3##")
    assert chunks[1].endswith("#+")
    assert "layer  70   75" in text


def test_scattered_layers_point_to_the_map():
    modules = [
        LinearModule(f"h.{layer}.attn.q", "q", layer, 4, 4, "attention")
        for layer in range(0, 20, 2)
    ]
    text = screen(Inventory(tuple(modules), 20, 1_000))
    assert "see map" in text
