"""A pretended card does what a card does: its size, Triton, graphs, waits, forks, a full memory."""

import pytest
from run import CARDS

from conftest import HERE, last_json

OF_CARD = {
    "t4": ("Tesla T4", [7, 5], 15095),
    "l4": ("NVIDIA L4", [8, 9], 22703),
    "a100": ("NVIDIA A100-SXM4-40GB", [8, 0], 40506),
    "h100": ("NVIDIA H100 80GB HBM3", [9, 0], 81079),
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_behaves_as_one(ground, card):
    ended = ground.on(card, "python", HERE / "probe.py")
    assert ended.code == 0, ended.out[-3000:]
    found = last_json(ended.out)
    name, capability, mebibytes = OF_CARD[card]
    assert (found["name"], found["capability"]) == (name, capability)
    assert (found["total"], found["free"]) > (mebibytes << 20, (mebibytes - 600) << 20)
    # Triton compiles for this card, launches, and is counted by name; faults are refused.
    assert found["triton"] == 3
    assert "cannot be accessed from Triton" in found["pointer of the host"]
    assert "no kernel image" in found["of another card"]
    # A graph is one launch of the host and keeps its three; a wait within a capture is an error.
    assert (found["graph"]["launches"], found["graph"]["in_graphs"]) == (1, 3)
    assert "captur" in found["wait in capture"]
    assert list(found["waits"].values()) == [1]
    assert found["flop"] == 2 * 8 * 16 * 4
    assert found["fork"] != 0, "a forked child used the card"
    assert found["too much"].startswith("OutOfMemoryError: CUDA out of memory")


def test_an_unknown_card_is_refused(ground):
    from run import main

    assert main(["a2000", "python", "-c", "1"]) == 2
