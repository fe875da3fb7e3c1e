"""How many runs train together: as many as speed and memory allow, and those that share most."""

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loracle.engine import throughput
from loracle.engine.throughput import saturation_tokens, token_rates
from loracle.errors import UsageError
from loracle.runner.bundle_size import (
    StepMemory,
    bundle_budget,
    choose_bundle_size,
    group_runs,
)

# A device that is full at 8192 tokens: below it twice the tokens are nearly twice the rate.
RATES = [(1024, 10.0), (2048, 19.0), (4096, 36.0), (8192, 58.0), (16384, 60.0), (32768, 59.0)]


def never():
    raise AssertionError("measured where the answer does not matter")


def chosen(**changes):
    settings = {
        "num_runs": 12,
        "requested": None,
        "device_type": "cuda",
        "tokens_per_step": 1000.0,
        "rates": lambda: RATES,
        "memory": lambda: StepMemory(base_gib=1.0, step_gib=2.0, free_gib=70.0),
    }
    return choose_bundle_size(**(settings | changes))


def test_as_many_as_fill_the_device_where_memory_allows():
    choice = chosen()
    assert choice.size == 9
    assert choice.saturation_tokens == 8192
    assert choice.reason == (
        "1000 tokens per step of a run, 8192 fill the device, memory for 56 runs: limited by speed"
    )


def test_a_long_step_fills_the_device_alone_and_no_memory_is_measured():
    assert chosen(tokens_per_step=9000.0, memory=never).size == 1


@pytest.mark.parametrize(("free_gib", "size"), [(10.0, 8), (5.0, 4), (1.0, 1)])
def test_no_more_than_fit_into_four_fifths_of_what_is_free(free_gib, size):
    choice = chosen(memory=lambda: StepMemory(base_gib=1.0, step_gib=2.0, free_gib=free_gib))
    assert choice.size == size
    assert choice.reason.endswith("limited by memory")


def test_where_memory_cannot_tell_speed_decides():
    choice = chosen(memory=lambda: None)
    assert (choice.size, choice.memory) == (9, None)
    assert "memory for n/a runs" in choice.reason


def test_no_more_than_there_are():
    choice = chosen(num_runs=3)
    assert choice.size == 3
    assert choice.reason.endswith("limited by the runs there are")


def test_one_run_and_what_was_asked_need_no_measurement():
    assert chosen(num_runs=1, rates=never, memory=never).size == 1
    on_cpu = {"device_type": "cpu", "rates": never, "memory": never}
    assert chosen(requested=4, **on_cpu).size == 4
    assert chosen(requested=40, **on_cpu).size == 12
    assert chosen(requested=4, **on_cpu).reason == "as asked"


def test_on_a_cpu_runs_train_in_turn_unless_asked_otherwise():
    alone = chosen(device_type="cpu", rates=never, memory=never)
    assert alone.size == 1
    assert alone.reason == "one run's 1000 tokens per step fill a CPU"
    assert chosen(device_type="cpu", requested=3).size == 3


def test_the_choice_is_plain_json_with_its_reasons():
    found = json.loads(json.dumps(asdict(chosen())))
    assert found["tokens_per_s"] == [list(pair) for pair in RATES]
    assert found["memory"] == {"base_gib": 1.0, "step_gib": 2.0, "free_gib": 70.0}


def test_a_device_is_full_where_the_rate_first_comes_near_its_best():
    assert saturation_tokens(RATES) == 8192
    assert saturation_tokens([(256, 50.0), (512, 51.0)]) == 256


def test_rates_are_of_real_products():
    found = token_rates(torch.ones(64, 32), counts=(4, 64), repeats=2)
    assert [count for count, _ in found] == [4, 64]
    assert all(rate > 0 for _, rate in found)


def test_rates_end_where_memory_does(monkeypatch):
    def fastest(_weight, *, count, repeats):
        if count > 512:
            raise torch.OutOfMemoryError
        return 0.5 * repeats

    monkeypatch.setattr(throughput, "_fastest_s", fastest)
    rates = token_rates(torch.ones(2, 2), counts=(256, 512, 1024, 2048), repeats=1)
    assert rates == [(256, 512.0), (512, 1024.0)]


def test_runs_of_like_layers_train_together_and_bundles_keep_the_order():
    # Six arms of one seed, then of the next.
    lowest = [0, 20, 0, 20, 10, 0] * 2
    assert group_runs(lowest, size=3) == [[0, 2, 5], [1, 3, 7], [4, 9, 10], [6, 8, 11]]


@given(
    st.lists(st.integers(0, 30), max_size=20),
    st.integers(1, 8),
)
def test_every_run_is_in_one_bundle_and_all_but_the_last_are_full(lowest, size):
    bundles = group_runs(lowest, size=size)
    assert sorted(index for group in bundles for index in group) == list(range(len(lowest)))
    assert all(len(group) == size for group in bundles[:-1])
    assert [group[0] for group in bundles] == sorted(group[0] for group in bundles)
    if size == 1:
        assert bundles == [[index] for index in range(len(lowest))]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=16), st.integers(1, 4), st.data())
def test_who_trains_with_whom_does_not_depend_on_whole_bundles_being_gone(lowest, size, data):
    bundles = group_runs(lowest, size=size)
    done = data.draw(st.integers(0, len(bundles)))
    left = sorted(index for group in bundles[done:] for index in group)
    again = group_runs([lowest[index] for index in left], size=size)
    assert [[left[place] for place in group] for group in again] == bundles[done:]


def test_a_gpu_takes_all_members_tokens_at_once_and_a_cpu_one_members():
    assert bundle_budget([4096, 1024], device_type="cuda") == 5120
    assert bundle_budget([4096, 1024], device_type="cpu") == 1024


def test_more_runs_than_memory_holds_are_refused():
    memory = StepMemory(base_gib=1.0, step_gib=2.0, free_gib=5.0)
    assert chosen(requested=4, memory=lambda: memory).size == 4
    with pytest.raises(UsageError, match=r"^bundle_size: 8 runs of 1.0 GiB each .* at most 4 do$"):
        chosen(requested=8, memory=lambda: memory)
    assert chosen(requested=8, device_type="cpu", memory=never).size == 8
    assert chosen(requested=8, memory=lambda: None).size == 8
