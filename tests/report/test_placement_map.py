"""The map of a plan: every adapter where it is, its rank, and nothing wider than the screen."""

import io

import pytest
from rich.console import Console

from geometries import LLAMA_2_7B, SMOLLM2_135M, TINY, UNUSUAL
from loracle.config.run import PlacementConfig
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import Inventory, LinearModule, resolve_placement
from loracle.report.terminal.placement_map import placement_map

SMOLLM2 = inventory_from_architecture(SMOLLM2_135M)


def screen(placement, inventory: Inventory = SMOLLM2, *, rank: int = 16, columns: int = 100) -> str:
    plan = resolve_placement(placement, inventory=inventory, rank=rank, alpha=2.0 * rank)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(placement_map(plan, inventory, columns=columns))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(text: str, *, starts: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(starts)]


def test_a_preset_in_a_real_model():
    assert screen("attention-qv").splitlines() == [
        "attention-qv: 60 modules, rank 16, alpha 32, 921,600 parameters (0.69% of the base)",
        "layer      0    5    10   15   20   25",
        "q_proj     ##############################  16",
        "k_proj     ..............................",
        "v_proj     ##############################  16",
        "o_proj     ..............................",
        "gate_proj  ..............................",
        "up_proj    ..............................",
        "down_proj  ..............................",
        "# rank 16   . no adapter",
    ]


def test_layers_stand_in_their_columns():
    text = screen(PlacementConfig(modules=["up_proj"], layers=[0, 7, 29]))
    (ruler,), (row,) = lines(text, starts="layer"), lines(text, starts="up_proj ")
    start = ruler.index("0")
    assert [place - start for place, mark in enumerate(row) if mark == "#"] == [0, 7, 29]
    assert ruler.index("25") - start == 25


def test_several_ranks_have_marks_that_rise():
    ranks = {"layers:0-9": 8, "layers:20-29": 32}
    text = screen(PlacementConfig(modules=["q_proj", "down_proj"], ranks=ranks))
    row = "1" * 10 + "2" * 10 + "3" * 10
    assert lines(text, starts="q_proj ") == [f"q_proj     {row}  8-32"]
    assert "rank 8-32, alpha / r 2, " in text.splitlines()[0]
    assert lines(text, starts="1") == ["1 rank 8   2 rank 16   3 rank 32   . no adapter"]


def test_more_ranks_than_marks_share_the_last():
    modules = [
        LinearModule(f"h.{layer}.up", "up", layer, 90, 90, "feed-forward") for layer in range(40)
    ]
    inventory = Inventory(tuple(modules), 40, 10_000)
    ranks = {f"layers:{layer}": layer + 1 for layer in range(40)}
    text = screen(PlacementConfig(modules=["up"], ranks=ranks), inventory)
    assert "z rank 35-40 . no adapter" in " ".join(text.split())
    (row,) = lines(text, starts="up ")
    assert row.endswith("xyzzzzzz  1-40")


def test_the_head_stands_below_the_map():
    text = screen(PlacementConfig(modules=["q_proj", "lm_head"], ranks={"lm_head": 4}))
    assert lines(text, starts="lm_head: ") == ["lm_head: rank 4"]
    assert lines(screen("q_proj"), starts="lm_head") == []
    assert lines(screen("lm-head"), starts="lm_head") == ["lm_head: rank 16"]


def test_a_layer_without_such_a_module_is_blank():
    inventory = inventory_from_architecture(UNUSUAL["recurrent_gemma"])
    text = screen("q_proj", inventory)
    assert [line.split()[1] for line in lines(text, starts="q_proj ")] == ["#"]
    (row,) = lines(text, starts="linear_x")
    assert row.split()[1] == ".."


def test_a_kind_with_two_meanings_is_shown_with_its_parent():
    text = screen("output-projections", inventory_from_architecture(TINY["gpt2"]))
    assert [line.split() for line in lines(text, starts="attn.c_proj")] == [
        ["attn.c_proj", "###", "16"]
    ]
    assert [line.split() for line in lines(text, starts="mlp.c_proj")] == [
        ["mlp.c_proj", "###", "16"]
    ]


def test_a_rank_beyond_what_an_update_can_have_is_told():
    text = screen("k_proj", rank=212)
    assert text.splitlines()[-1] == (
        "rank beyond what an update can have, which is wasted: k_proj 212 (of 192)"
    )
    assert "wasted" not in screen("k_proj", rank=192)


@pytest.mark.parametrize("architecture", [SMOLLM2_135M, LLAMA_2_7B, *TINY.values()])
@pytest.mark.parametrize("placement", ["all-linear", "last-1", "attention"])
def test_nothing_is_wider_than_100_columns(architecture, placement):
    inventory = inventory_from_architecture(architecture)
    assert max(map(len, screen(placement, inventory).splitlines())) <= 100


def test_a_deep_model_is_shown_in_pieces():
    modules = [
        LinearModule(f"h.{layer}.up", "up", layer, 4, 4, "feed-forward") for layer in range(95)
    ]
    text = screen("all-linear", Inventory(tuple(modules), 95, 10_000), rank=2, columns=56)
    rows = [line.split()[1] for line in lines(text, starts="up ")]
    assert [len(row) for row in rows] == [40, 40, 15]
    assert set("".join(rows)) == {"#"}
    assert len(lines(text, starts="layer  40")) == 1
