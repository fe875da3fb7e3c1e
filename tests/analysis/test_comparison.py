"""One comparison, judged: its verdict, and the sentence that says why."""

import pytest

from loracle.analysis.comparison import Comparison, judged
from loracle.analysis.stats.difference import Difference


def difference(**changes) -> Difference:
    return Difference(
        **{
            "estimate": -0.02,
            "standard_error": 0.004,
            "degrees_of_freedom": 8.0,
            "low": -0.03,
            "high": -0.01,
            "p_value": 0.001,
            "num_seeds": 3,
            "num_examples": 100,
            "seed_share": 0.4,
        }
        | changes
    )


def compared(metric="loss_nats_per_token", *, floor=0.0, **changes) -> Comparison:
    (found,) = judged([Comparison("ours", "theirs", metric, difference(**changes), floor)])
    return found


def test_lower_loss_is_better_and_higher_bleu_is_better():
    assert compared().verdict == "better"
    assert compared(estimate=0.02, low=0.01, high=0.03).verdict == "worse"
    assert compared("bleu").verdict == "worse"
    assert compared("bleu", estimate=0.02, low=0.01, high=0.03).verdict == "better"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Loss 0.0200 nats per token below theirs (95% interval -0.0300 to -0.0100, Holm p = "),
        ({"p_value": 0.0001}, "Holm p < 0.001)."),
        ({"p_value": 0.3}, "Holm p = 0.300): this could be chance; a difference of "),
        ({"floor": 0.02}, "no more than the same run differs by when it is repeated (0.0200 nats"),
        ({"p_value": None, "low": None, "high": None, "num_examples": 1}, "on one example"),
        ({"estimate": 0.0, "standard_error": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0},
         "Identical to theirs on every seed and example."),
        ({"estimate": 0.0, "p_value": 1.0}, "Loss 0.0000 nats per token from theirs"),
    ],
)  # fmt: skip
def test_a_reason_holds_the_figures(changes, words):
    assert words in compared(**changes).reason


def test_a_verdict_needs_p_below_5_percent_and_more_than_the_noise_floor():
    assert compared(p_value=0.0499).verdict == "better"
    assert compared(p_value=0.05).verdict == "not distinguishable"
    assert compared(floor=0.019).verdict == "better"
    assert compared(floor=0.02).verdict == "not distinguishable"
    assert compared(floor=None).verdict == "better"


def test_a_reason_without_a_visible_effect_does_not_name_one():
    found = compared(p_value=0.3, standard_error=0.0, seed_share=None)
    assert found.reason.endswith("this could be chance.")
