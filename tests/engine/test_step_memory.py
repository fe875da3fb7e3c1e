"""What tensors take is counted in steps that are off the clock, and changes no bit of them."""

import pytest
import torch

from loracle.model.live_bytes import LiveBytes, computing
from runs_fixture import contents, load, settings

SHORT = settings(train__max_steps=6, eval__every_steps=3, measure__latency_trials=0)


def memory_of(run):
    return load(run / "result.json")["efficiency"]["peak_memory_gib"]


def test_a_run_records_what_its_tensors_took(finished):
    memory = memory_of(finished)
    assert 0 < memory["train_tensors"] < memory["train"]
    assert "memory.json" not in contents(finished)


def test_the_count_does_not_depend_on_what_the_process_did_before(place, tmp_path):
    for name in ("one", "two"):
        outcome = place.baseline("--out", tmp_path / name, *SHORT)
        assert outcome.code == 0, outcome.err
    one, two = (memory_of(tmp_path / name)["train_tensors"] for name in ("one", "two"))
    # A few KB of constants that the engine keeps are made in whichever run needs them first.
    assert two == pytest.approx(one, abs=16 * 1024 / 2**30)


def test_fewer_modules_take_less(place, tmp_path):
    result = {}
    for name in ("all-linear", "last-1"):
        outcome = place.baseline("--out", tmp_path / name, *SHORT, lora__placement=name)
        assert outcome.code == 0, outcome.err
        result[name] = memory_of(tmp_path / name)["train_tensors"]
    assert result["last-1"] < result["all-linear"]


def test_peaks_outlive_the_process_that_saw_them(place, nursery, tmp_path):
    """Stopped when all steps were taken, a run still knows what they took."""
    words = ["baseline", place.config, *SHORT, "--set", "checkpoint.every_steps=1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert nursery.live([*words, "--out", whole], folder=whole).code == 0
    assert nursery.live([*words, "--out", cut], folder=cut, step=5, delay_s=0.0).code == -9
    before = load(cut / "memory.json")
    assert nursery.live([*words, "--out", cut, "--resume"], folder=cut).code == 0
    memory = memory_of(cut)
    assert memory["train_tensors"] == before["tensors_gib"]["train"]
    assert memory["train_tensors"] == pytest.approx(memory_of(whole)["train_tensors"], rel=0.01)
    assert memory["train"] >= before["peaks_gib"]["train"]


def test_views_count_once_and_what_is_let_go_counts_no_more():
    with LiveBytes() as live:
        first = torch.ones(1000)
        second = first.view(10, 100)[3:]
        assert live.live_bytes == 4000
        del first
        assert live.live_bytes == 4000
        del second
        assert live.live_bytes == 0
        assert live.peak_bytes == 4000
        live.forget_peak()
        assert live.peak_bytes == 0


def test_bytes_are_told_apart_by_what_they_are_for():
    with LiveBytes() as live:
        weight = torch.ones(100)
        live.hold([weight], "weights")
        with computing("head"):
            logits = weight * 2
        rest = logits + 1
        assert live.parts_at_peak == {"weights": 400, "head": 400, "activations": 400}
        assert sum(live.parts_at_peak.values()) == live.peak_bytes
    assert rest.numel() == 100


def test_gradients_are_told_when_they_arrive():
    with LiveBytes() as live:
        weight = torch.nn.Parameter(torch.ones(100))
        live.hold([weight], "weights")
        hooks = live.hold_gradients([weight])
        (weight * 3).sum().backward()
        assert live.live_bytes == 800
        live.forget_peak()
        assert live.parts_at_peak == {"weights": 400, "gradients": 400}
    assert len(hooks) == 1


@pytest.mark.parametrize("granule", [1, 512])
def test_blocks_are_rounded_as_an_allocator_rounds_them(granule):
    with LiveBytes(granule=granule) as live:
        kept = [torch.ones(1, dtype=torch.uint8) for _ in range(3)]
        assert live.live_bytes == 3 * granule
    assert len(kept) == 3
