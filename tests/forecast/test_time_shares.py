"""The share of validations, and the round number of examples that would make it a fifth."""

import pytest

from loracle.config.files import load_config
from loracle.forecast.time_shares import Shares, shares_of_tokens


def test_most_of_a_run_on_alpaca_is_validation():
    config = load_config(overrides=["train.max_steps=1000"])
    shares = shares_of_tokens(config, num_scored=10_400)
    assert shares.frac == pytest.approx(104_000 / (104_000 + 3 * 8000))
    assert shares.words() == (
        "validation: 81% of the time (10 x 10,400 examples); eval.max_examples=600 would make "
        "it 20%"
    )


@pytest.mark.parametrize(
    ("validation", "examples", "suggested"),
    [(0.4, 1000, None), (9.0, 1000, 100), (9.0, 80, None), (1.0, 5000, 1000)],
)
def test_a_number_is_suggested_where_it_matters(validation, examples, suggested):
    shares = Shares(validation, rest=1.0, num_examples=examples, num_validations=1)
    assert shares.suggested_examples() == suggested
    assert ("would make it" in shares.words()) == (suggested is not None)


def test_the_number_gives_at_most_the_share_that_it_says():
    shares = Shares(3.0, rest=1.0, num_examples=9000, num_validations=2)
    assert shares.with_examples(shares.suggested_examples()) <= 0.2
