"""Clocks and memory: what is measured, and on what."""

import mmap
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loracle.engine import measure
from loracle.engine.measure import MemoryMeter, Parameters, step_clock
from loracle.text import GIB
from tiny_engine import CPU


def rows(times, *, clocked=True, tokens=100):
    return [{"clocked": clocked, "step_time_s": time, "num_tokens": tokens} for time in times]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 97])
def test_quartiles_are_numpys(count):
    draw = random.Random(count)
    times = [draw.expovariate(1) for _ in range(count)]
    clock = step_clock(rows(times))
    quartiles = np.percentile(times, [25, 50, 75])
    assert [clock.p25_s, clock.median_s, clock.p75_s] == pytest.approx(quartiles)
    assert clock.mean_s == pytest.approx(np.mean(times))
    assert clock.num_steps == count
    assert clock.tokens_per_s == pytest.approx(100 * count / sum(times))


def test_steps_that_are_not_clocked_do_not_count():
    mixed = [*rows([100.0, 50.0], clocked=False, tokens=9), *rows([1.0, 3.0])]
    clock = step_clock(mixed)
    assert (clock.median_s, clock.num_steps, clock.tokens_per_s) == (2.0, 2, 50.0)


@pytest.mark.parametrize("steps", [[], rows([1.0]), rows([1.0, 2.0], clocked=False)])
def test_fewer_than_two_clocked_steps_are_no_clock(steps):
    assert step_clock(steps) is None


def test_parameter_counts():
    parameters = Parameters(trainable=25, base=75)
    assert parameters.total == 100
    assert parameters.trainable_frac == 0.25


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_block_counts_in_its_phase_and_not_in_the_next():
    meter = MemoryMeter(CPU)
    size = 200 * 2**20
    with meter.phase("before"):
        pass
    # From the kernel and not from malloc, which may have been told to keep what it gets.
    with meter.phase("train"), mmap.mmap(-1, size) as block:
        for page in range(0, size, 4096):
            block[page] = 1
    with meter.phase("after"):
        pass
    grown = (meter.peaks_gib["train"] - meter.peaks_gib["before"]) * GIB
    assert 0.9 * size < grown < 1.5 * size
    assert meter.peaks_gib["after"] < meter.peaks_gib["train"] - 0.9 * size / GIB
    assert meter.kind == "resident_set"
    assert meter.reserved_gib == {}


@linux
def test_a_phase_entered_again_keeps_its_highest_peak(monkeypatch):
    peaks = iter([3 * GIB, 5 * GIB, 4 * GIB])
    monkeypatch.setattr(measure, "_peak_resident_set_bytes", lambda: next(peaks))
    meter = MemoryMeter(CPU)
    for _ in range(3):
        with meter.phase("train"):
            pass
    assert meter.peaks_gib == {"train": 5.0}


def test_free_memory_is_given_back_where_another_phase_begins_and_not_between_steps(monkeypatch):
    given_back = []
    monkeypatch.setattr(measure, "release_free_memory", lambda: given_back.append(True))
    meter, after = MemoryMeter(CPU), []
    for name in ("train", "train", "evaluate", "train", "train"):
        with meter.phase(name):
            after.append(len(given_back))
    assert after == [1, 1, 2, 3, 3]


def test_a_phase_that_fails_is_measured_too():
    meter = MemoryMeter(CPU)
    with pytest.raises(ZeroDivisionError), meter.phase("train"):
        raise ZeroDivisionError
    assert "train" in meter.peaks_gib


@pytest.mark.parametrize("failing", ["another platform", "a kernel that refuses"])
def test_where_a_peak_cannot_be_reset_there_is_none(failing, monkeypatch):
    if failing == "another platform":
        monkeypatch.setattr(measure.sys, "platform", "darwin")
    else:
        monkeypatch.setattr(measure.Path, "write_text", raise_os_error)
    meter = MemoryMeter(CPU)
    with meter.phase("train"):
        pass
    assert meter.peaks_gib == {"train": None}


def raise_os_error(*_: object, **__: object) -> None:
    raise PermissionError("not yours")


def fake_cuda(monkeypatch, *, allocated: int, reserved: int) -> list[str]:
    calls: list[str] = []
    fake = SimpleNamespace(
        reset_peak_memory_stats=lambda _: calls.append("reset"),
        max_memory_allocated=lambda _: allocated,
        max_memory_reserved=lambda _: reserved,
    )
    monkeypatch.setattr(measure.torch, "cuda", fake)
    return calls


def test_on_a_gpu_the_allocator_is_asked_after_a_reset(monkeypatch):
    calls = fake_cuda(monkeypatch, allocated=3 * GIB, reserved=4 * GIB)
    meter = MemoryMeter(torch.device("cuda"))
    with meter.phase("train"):
        calls.append("work")
    assert calls == ["reset", "work"]
    assert meter.kind == "cuda_allocated"
    assert (meter.peaks_gib, meter.reserved_gib) == ({"train": 3.0}, {"train": 4.0})
