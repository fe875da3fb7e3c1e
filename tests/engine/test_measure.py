"""Clocks, memory and latency: what is measured, on what, and what is left as it was."""

import mmap
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loracle.config.run import PlacementConfig
from loracle.engine import measure
from loracle.engine.measure import (
    Latency,
    MemoryMeter,
    Parameters,
    measure_latency,
    merged_weights,
    step_clock,
)
from loracle.model.inventory import inventory_of
from loracle.model.layers.lora import RoutedLinear
from loracle.text import GIB
from tiny_engine import CPU, attach, stock_model, stock_peft, tiny_base, tiny_plan

PROMPT = (3, 9, 27, 17, 51)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_pefts(family):
    base, plan = tiny_base(family), tiny_plan(family=family)
    adapter = attach(base, plan)
    merged = merged_weights(base, adapter="default")
    peft = stock_peft(stock_model(family), plan, like=adapter).merge_and_unload()
    assert merged.keys() == {module.name for module in plan.modules}
    for name, weight in merged.items():
        assert torch.equal(weight, peft.get_submodule(name).weight)
        assert not torch.equal(weight, base.model.get_submodule(name).get_base_layer().weight)


def test_merging_in_16_bit_adds_in_32():
    base = tiny_base(dtype=torch.bfloat16)
    attach(base, tiny_plan())
    for name, weight in merged_weights(base, adapter="default").items():
        layer = base.model.get_submodule(name)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        exact = layer.get_base_layer().weight.float() + layer.scaling["default"] * delta
        torch.testing.assert_close(weight, exact.bfloat16(), rtol=0, atol=0)


def test_merged_weights_that_do_not_fit_are_none(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    base = tiny_base()
    attach(base, tiny_plan())
    monkeypatch.setattr(RoutedLinear, "get_delta_weight", full)
    assert merged_weights(base, adapter="default") is None
    latency = measure_latency(base, PROMPT, adapter="default", new_tokens=2, trials=1)
    assert latency["merged"] is None
    assert latency["unmerged"].ms_per_token > 0


def decoded_with(monkeypatch):
    """Records the logits that each timed decoding starts from."""
    seen = []

    def watch(base, prompt, new_tokens):
        logits = base.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        seen.append((logits, new_tokens))
        return 0.001 * new_tokens + 0.01

    monkeypatch.setattr(measure, "_decode_s", watch)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_variant_is_the_model_it_says(family, monkeypatch):
    stock = stock_model(family)
    # GPT-2's head is tied to its embedding, which must not be merged along.
    everything = PlacementConfig(modules=[m.name for m in inventory_of(stock).modules])
    plan = tiny_plan(everything, family=family)
    base = tiny_base(family)
    adapter = attach(base, plan)
    seen = decoded_with(monkeypatch)
    digest = base.weights_digest()
    measure_latency(base, PROMPT, adapter="default", new_tokens=3, trials=2)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = stock(input_ids=ids).logits[0, -1]
        tuned = stock_peft(stock, plan, like=adapter)(input_ids=ids).logits[0, -1]
    assert not torch.allclose(plain, tuned, atol=1e-2)
    assert [tokens for _, tokens in seen] == [1, 3] * 9
    for index, (logits, _) in enumerate(seen):
        expected = plain if index // 2 % 3 == 0 else tuned
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert base.weights_digest() == digest


def test_latency_is_the_median_over_trials_without_the_warm_up(monkeypatch):
    base = tiny_base()
    attach(base, tiny_plan())
    # Warm-up, then three trials; each variant: (one token, five tokens) in seconds.
    trials = [(9.0, 99.0), (0.1, 0.5), (0.2, 1.8), (0.3, 0.9)]
    times = iter([second for pair in trials for _ in range(3) for second in pair])
    monkeypatch.setattr(measure, "_decode_s", lambda *_: next(times))
    done: list[int] = []
    result = measure_latency(
        base, PROMPT, adapter="default", new_tokens=5, trials=3, progress=done.append
    )
    assert list(result) == ["base", "unmerged", "merged"]
    for latency in result.values():
        assert latency.first_token_ms == pytest.approx(200)
        assert latency.ms_per_token == pytest.approx(150)
    assert done == [1] * 12


def test_every_trial_decodes_as_many_tokens_as_asked(monkeypatch):
    base = tiny_base()
    attach(base, tiny_plan())
    # EOS is always the likeliest token, and still held back.
    base.model.lm_head.weight.data[:] = 0
    base.model.lm_head.weight.data[base.tokenizer.eos_token_id] = 1e-3
    lengths = []
    generate = base.model.generate
    monkeypatch.setattr(
        base.model, "generate", lambda **kw: lengths.append(generate(**kw).shape[1]) or None
    )
    result = measure_latency(base, PROMPT, adapter="default", new_tokens=4, trials=1)
    assert lengths == [len(PROMPT) + 1, len(PROMPT) + 4] * 6
    assert all(isinstance(latency, Latency) for latency in result.values())
    assert all(latency.first_token_ms > 0 for latency in result.values())


def test_frozen_weights_come_back_bit_for_bit_even_after_an_error(monkeypatch):
    base = tiny_base()
    attach(base, tiny_plan())
    digest = base.weights_digest()
    parameters = {name: id(value) for name, value in base.model.named_parameters()}
    calls = []

    def fails_in_the_merged_variant(*_: object) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(measure, "_decode_s", fails_in_the_merged_variant)
    with pytest.raises(KeyboardInterrupt):
        measure_latency(base, PROMPT, adapter="default", new_tokens=2, trials=1)
    assert base.weights_digest() == digest
    assert {name: id(value) for name, value in base.model.named_parameters()} == parameters
