"""What is known of the examples before anything is loaded."""

import pytest

from loracle.config.files import load_config
from loracle.forecast.lengths import Lengths, full_pass, lengths_of, usual_batch
from tiny import write_records

SHORT = Lengths(prompt_tokens=20.4, response_tokens=29.6, num_records=100, basis="made up")


def test_the_demo_s_lengths_are_those_that_were_measured():
    lengths = lengths_of(load_config("demo"))
    assert lengths.num_records == 999
    assert lengths.tokens == pytest.approx(204.1)
    assert lengths.num_validation(load_config("demo")) == 200
    assert lengths.num_train(load_config("demo")) == 799


def test_a_data_set_of_the_hub_is_not_fetched():
    lengths = lengths_of(load_config(overrides=["data.source=alpaca"]))
    assert lengths.num_records == 52002
    other = lengths_of(load_config(overrides=["data.source='hub:some/body@main'"]))
    assert other.tokens == lengths.tokens
    assert other.basis == "assumed to be Alpaca's"


def test_fewer_records_can_be_asked_for():
    lengths = lengths_of(load_config(overrides=["data.source=alpaca", "data.max_records=1000"]))
    assert lengths.num_records == 1000


def test_a_local_file_is_counted_in_characters(tmp_path):
    path = write_records(tmp_path / "data.json", count=40, seed=0)
    lengths = lengths_of(load_config(overrides=[f"data.source='path:{path}'"]))
    assert lengths.num_records == 40
    assert lengths.prompt_tokens > lengths.response_tokens > 1


def test_a_usual_batch_has_examples_of_average_length():
    config = load_config(overrides=["train.batch_size=3"])
    assert usual_batch(SHORT, config) == [(20, 30)] * 3


@pytest.mark.parametrize(
    ("budget", "most", "longest", "tokens", "count"),
    [(200, 8, 128, 200, 4), (230, 8, 128, 230, 4), (10_000, 8, 100, 800, 8), (30, 8, 64, 64, 1)],
)
def test_a_full_pass_fills_its_budget(budget, most, longest, tokens, count):
    batch = full_pass(SHORT, budget=budget, most=most, longest=longest)
    assert len(batch) == count
    assert sum(map(sum, batch)) == tokens
    assert max(map(sum, batch)) <= longest


def test_examples_are_no_longer_than_they_may_be():
    config = load_config(overrides=["data.source=alpaca", "data.max_tokens=32"])
    assert lengths_of(config).example() == (1, 31)
    assert sum(lengths_of(config).example()) == 32
