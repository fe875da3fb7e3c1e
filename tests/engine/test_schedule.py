"""Learning rates are Transformers'; the data order is a function of seed and step."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from loracle.engine.schedule import DataOrder, learning_rate
from tiny_engine import train_config

THEIR_NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def their_rates(name: str, *, warmup: int, steps: int, peak: float) -> list[float]:
    """The rate of each step of an ordinary loop, warm-up steps counted by hand."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(THEIR_NAMES[name], optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", THEIR_NAMES)
@pytest.mark.parametrize(
    ("steps", "warmup_frac", "warmup"),
    [(1000, 0.03, 30), (60, 0.03, 2), (10, 0.0, 0), (7, 0.5, 4), (1, 0.0, 0), (3, 0.99, 3)],
)
def test_every_rate_is_that_of_transformers(schedule, steps, warmup_frac, warmup):
    train = train_config(
        schedule=schedule, max_steps=steps, warmup_frac=warmup_frac, learning_rate=3e-4
    )
    candidate = [learning_rate(step, train=train) for step in range(steps)]
    reference = their_rates(schedule, warmup=warmup, steps=steps, peak=3e-4)
    assert candidate == pytest.approx(reference, rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("schedule", THEIR_NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_frac", [0.0, 0.03, 0.5, 0.99])
def test_the_shortest_run_has_a_step_that_trains(schedule, steps, warmup_frac):
    train = train_config(schedule=schedule, max_steps=steps, warmup_frac=warmup_frac)
    rates = [learning_rate(step, train=train) for step in range(steps)]
    assert max(rates) > 0
    assert steps > 1 or rates == [train.learning_rate]


def test_cosine_and_linear_end_at_zero():
    for schedule in ("cosine", "linear"):
        train = train_config(schedule=schedule, max_steps=20)
        assert learning_rate(20, train=train) == pytest.approx(0, abs=1e-12)
        assert learning_rate(25, train=train) >= 0


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))


@settings(deadline=None)
@given(SIZES)
def test_every_example_comes_once_per_epoch_in_full_batches(sizes):
    count, batch_size, seed = sizes
    order = DataOrder(range(count), batch_size=batch_size, seed=seed)
    epochs = 3
    steps = -(-epochs * count // batch_size)
    stream = []
    for step in range(steps):
        batch = order.batch(step)
        assert len(batch) == batch_size
        stream += batch
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert order.steps_per_epoch == count / batch_size


def test_a_batch_crosses_from_one_epoch_to_the_next():
    order = DataOrder(range(10), batch_size=4, seed=0)
    assert set(order.batch(2)[:2]) == set(range(10)) - {*order.batch(0), *order.batch(1)}
    following = [*order.batch(2)[2:], *order.batch(3), *order.batch(4)]
    assert sorted(following) == list(range(10))


def test_a_batch_larger_than_the_data_repeats_it():
    assert Counter(DataOrder(range(3), batch_size=6, seed=0).batch(0)) == {0: 2, 1: 2, 2: 2}


def test_seeds_and_epochs_are_shuffled_differently():
    orders = {
        tuple(DataOrder(range(30), batch_size=30, seed=seed).batch(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(30)) not in orders


def test_any_step_can_be_asked_first():
    in_turn = DataOrder(range(13), batch_size=4, seed=7)
    expected = [in_turn.batch(step) for step in range(12)]
    fresh = DataOrder(range(13), batch_size=4, seed=7)
    assert [fresh.batch(step) for step in reversed(range(12))] == expected[::-1]


def test_every_place_of_an_epoch_is_equally_likely():
    """Chi-squared of where example 0 lands over 2,000 seeds, 9 degrees of freedom."""
    places = Counter(
        DataOrder(range(10), batch_size=10, seed=seed).batch(0).index(0) for seed in range(2000)
    )
    chi_squared = sum((places[place] - 200) ** 2 / 200 for place in range(10))
    assert chi_squared < 33.7  # exceeded by chance once in ten thousand
