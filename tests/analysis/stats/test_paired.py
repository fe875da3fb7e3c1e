"""The interval of a paired difference: textbook cases, and simulated studies of known effect."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import ttest_rel

from loracle.analysis.stats.difference import critical_value, difference_of
from loracle.analysis.stats.paired import paired_difference, variance_parts

EFFECT = 0.05
EXAMPLE_SD, BOTH_SD = 0.05, 0.02
# Of the variance of a difference over 3 seeds and 100 examples: none, a tenth, half, nine tenths.
SEED_SD = {"none": 0.0, "small": 0.0035, "equal": 0.011, "dominant": 0.05}


@dataclass(frozen=True)
class Studies:
    """Many independent studies of one design."""

    differences: np.ndarray
    """(studies, S, E)."""
    tokens: np.ndarray
    """(studies, E)."""
    truth: float
    """Nats per token, over the population of examples."""


def simulate(
    num_studies: int, *, seeds: int, examples: int, seed_sd: float, by_length: bool, effect: float
) -> Studies:
    """Differences per token: effect + noise of seed, example and both; lengths as Alpaca's."""
    draw = np.random.default_rng([num_studies, seeds, examples, by_length, int(1e6 * seed_sd)])
    tokens = lengths(draw, (num_studies, examples))
    of_examples = EXAMPLE_SD * draw.standard_normal((num_studies, 1, examples))
    truth = effect
    if by_length:
        of_examples = 0.8 * of_examples + 0.6 * EXAMPLE_SD * length_score(tokens)[:, None, :]
        population = lengths(np.random.default_rng(0), 10**6)
        truth += 0.6 * EXAMPLE_SD * np.average(length_score(population), weights=population)
    per_token = (
        effect
        + of_examples
        + seed_sd * draw.standard_normal((num_studies, seeds, 1))
        + BOTH_SD * draw.standard_normal((num_studies, seeds, examples))
    )
    return Studies(per_token * tokens[:, None, :], tokens, truth)


def lengths(draw: np.random.Generator, shape) -> np.ndarray:
    return np.clip(np.round(draw.lognormal(4.4, 0.9, shape)), 4, 470)


def length_score(tokens: np.ndarray) -> np.ndarray:
    return (np.log(tokens) - 4.4) / 0.9


def missed_frac(studies: Studies, *, tail: float = 0.025) -> float:
    """The fraction of studies whose interval does not hold the truth."""
    parts = variance_parts(studies.differences, studies.tokens)
    variance = parts.seed_variance + parts.example_variance
    _, seeds, examples = studies.differences.shape
    critical = critical_value(
        tail, seed_share=parts.seed_variance / variance, num_seeds=seeds, num_examples=examples
    )
    return float(np.mean(abs(parts.estimate - studies.truth) > critical * np.sqrt(variance)))


@pytest.mark.parametrize("by_length", [False, True], ids=["any length", "by length"])
@pytest.mark.parametrize("seed_sd", SEED_SD)
@pytest.mark.parametrize("examples", [100, 200])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_of_a_known_effect_covers_it_95_times_in_100(
    seeds, examples, seed_sd, by_length
):
    design = {"seeds": seeds, "examples": examples, "seed_sd": SEED_SD[seed_sd]}
    studies = simulate(4000, **design, by_length=by_length, effect=EFFECT)
    assert 0.93 <= 1 - missed_frac(studies) <= 0.97


@pytest.mark.parametrize("seed_sd", SEED_SD)
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_known_null_is_found_to_differ_at_most_6_times_in_100(seeds, seed_sd):
    studies = simulate(
        6000, seeds=seeds, examples=100, seed_sd=SEED_SD[seed_sd], by_length=False, effect=0.0
    )
    assert studies.truth == 0
    assert missed_frac(studies) <= 0.06


@pytest.mark.parametrize("seed_sd", ["small", "dominant"])
def test_holm_over_eight_arms_that_share_a_reference_errs_at_most_6_times_in_100(seed_sd):
    draw, wrong, studies = np.random.default_rng(7), 0, 1500
    for _ in range(studies // 100):
        nll = SEED_SD[seed_sd] / 2**0.5 * draw.standard_normal((9, 100, 3, 1))
        nll = nll + EXAMPLE_SD / 2**0.5 * draw.standard_normal((9, 100, 1, 100))
        nll = nll + BOTH_SD / 2**0.5 * draw.standard_normal((9, 100, 3, 100))
        tokens = lengths(draw, (100, 100))
        parts = variance_parts((nll[1:] - nll[0]) * tokens[:, None, :], tokens)
        variance = parts.seed_variance + parts.example_variance
        # Holm rejects any at all exactly if it rejects the smallest p at the strictest level.
        critical = critical_value(
            0.025 / 8, seed_share=parts.seed_variance / variance, num_seeds=3, num_examples=100
        )
        wrong += int((abs(parts.estimate) > critical * np.sqrt(variance)).any(0).sum())
    assert wrong / studies <= 0.06


def test_the_smallest_effect_is_found_four_times_in_five():
    design = {"seeds": 5, "examples": 200, "seed_sd": SEED_SD["small"], "by_length": False}
    none = simulate(3000, **design, effect=0.0)
    parts = variance_parts(none.differences, none.tokens)
    typical = difference_of(
        0.0,
        seed_variance=float(parts.seed_variance.mean()),
        example_variance=float(parts.example_variance.mean()),
        num_seeds=5,
        num_examples=200,
    )
    some = simulate(3000, **design, effect=typical.smallest_effect_at(0.05))
    found = missed_frac(Studies(some.differences, some.tokens, truth=0.0))
    assert 0.75 < found < 0.87


def test_the_interval_is_the_same_as_the_many_studies_at_once():
    studies = simulate(3, seeds=3, examples=20, seed_sd=0.01, by_length=True, effect=EFFECT)
    parts = variance_parts(studies.differences, studies.tokens)
    for each in range(3):
        ours = studies.differences[each] + 100
        found = paired_difference(ours, np.full((3, 20), 100.0), studies.tokens[each])
        assert found.estimate == pytest.approx(parts.estimate[each])
        variance = parts.seed_variance[each] + parts.example_variance[each]
        assert found.standard_error == pytest.approx(variance**0.5)
        assert found.seed_share == pytest.approx(parts.seed_variance[each] / variance)


def test_mean_squares_are_those_of_a_hand_made_analysis_of_variance():
    # x = difference per token: row means 3 and 5, column means 1, 4 and 7, mean 4.
    x = np.array([[0.0, 2.0, 7.0], [2.0, 6.0, 7.0]])
    # MS_seed = 3 (1 + 1) / 1, MS_example = 2 (9 + 0 + 9) / 2, residuals 0, -1, 1, 0, 1, -1.
    parts = variance_parts(10 * x, np.full(3, 10.0))
    assert parts.estimate == pytest.approx(4)
    assert parts.seed_variance == pytest.approx(6 / 6)
    assert parts.example_variance == pytest.approx((18 - 2) / 6)


def test_differences_that_only_seeds_make_are_a_paired_t_test_over_seeds():
    draw = np.random.default_rng(1)
    ours, theirs = draw.normal(1.6, 0.01, (2, 5, 1))
    tokens = np.full(400, 50.0)
    found = paired_difference(ours * tokens, theirs * tokens, tokens)
    oracle = ttest_rel(ours[:, 0], theirs[:, 0])
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval()))
    assert found.degrees_of_freedom == pytest.approx(4)
    assert found.seed_share == pytest.approx(1)


def test_differences_that_only_examples_make_are_a_paired_t_test_over_examples():
    draw = np.random.default_rng(2)
    ours, theirs = draw.normal(80, 20, (2, 30))
    tokens = np.full(30, 50.0)
    found = paired_difference(np.tile(ours, (4, 1)), np.tile(theirs, (4, 1)), tokens)
    oracle = ttest_rel(ours / 50, theirs / 50)
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval()))
    assert found.degrees_of_freedom == pytest.approx(29)
    assert found.seed_share == pytest.approx(0, abs=1e-6)


def test_the_estimate_is_the_difference_of_token_weighted_losses():
    draw = np.random.default_rng(3)
    tokens = lengths(draw, 40)
    ours, theirs = draw.normal(90, 9, (2, 3, 40))
    found = paired_difference(ours, theirs, tokens)
    losses = [(arm.sum(1) / tokens.sum()).mean() for arm in (ours, theirs)]
    assert found.estimate == pytest.approx(losses[0] - losses[1])
    assert (found.num_seeds, found.num_examples) == (3, 40)


def test_equal_weights_leave_plain_means():
    difference = np.random.default_rng(4).normal(0.1, 1, (3, 20))
    found = paired_difference(difference, np.zeros((1, 20)), np.ones(20))
    assert found.estimate == pytest.approx(difference.mean())
    sevenfold = paired_difference(7 * difference, np.zeros((1, 20)), np.full(20, 7))
    assert sevenfold.estimate == pytest.approx(found.estimate)
    assert sevenfold.standard_error == pytest.approx(found.standard_error)


def test_the_ratio_is_linearised_as_a_delete_one_jackknife_says():
    draw = np.random.default_rng(5)
    tokens = lengths(draw, 300)
    difference = tokens * (0.03 + 0.05 * length_score(tokens) + 0.02 * draw.normal(size=300))
    found = paired_difference(np.tile(difference, (3, 1)), np.zeros((1, 300)), tokens)
    left_out = (difference.sum() - difference) / (tokens.sum() - tokens)
    jackknife = (299 / 300 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
    assert found.standard_error == pytest.approx(jackknife, rel=0.02)


def test_the_variance_is_never_below_that_of_the_seeds_alone():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        difference = draw.normal(0, 1, (3, 12))
        found = paired_difference(difference, np.zeros((1, 12)), np.ones(12))
        over_seeds = difference.mean(1).std(ddof=1) / 3**0.5
        assert found.standard_error >= over_seeds * (1 - 1e-12)


def test_swapping_the_arms_turns_the_interval_round():
    draw = np.random.default_rng(6)
    ours, theirs = draw.normal(80, 8, (2, 3, 25))
    tokens = lengths(draw, 25)
    one, other = paired_difference(ours, theirs, tokens), paired_difference(theirs, ours, tokens)
    assert other.estimate == pytest.approx(-one.estimate)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
    assert other.p_value == pytest.approx(one.p_value)


def test_identical_arms_differ_by_exactly_zero():
    nll = np.random.default_rng(8).normal(80, 8, (3, 25))
    found = paired_difference(nll, nll, np.full(25, 40))
    assert (found.estimate, found.standard_error, found.low, found.high) == (0, 0, 0, 0)
    assert found.p_value == 1
    assert found.smallest_effect_at(0.05) is None


def test_one_seed_has_a_difference_and_no_interval():
    found = paired_difference([[10.0, 30.0]], [[8.0, 27.0]], [5, 20])
    assert found.estimate == pytest.approx(0.2)
    assert (found.low, found.high, found.p_value, found.smallest_effect_at(0.05)) == (None,) * 4
    assert found.num_seeds == 1


def test_a_model_without_seeds_is_compared_with_every_seed():
    draw = np.random.default_rng(9)
    ours, base, tokens = draw.normal(80, 8, (3, 25)), draw.normal(90, 8, (1, 25)), lengths(draw, 25)
    found = paired_difference(ours, base, tokens)
    assert found == paired_difference(ours, np.tile(base, (3, 1)), tokens)
    assert found.num_seeds == 3


def test_p_is_below_5_percent_exactly_if_the_interval_leaves_zero_out():
    found = [
        paired_difference(np.random.default_rng(seed).normal(0.6, 1, (3, 8)), [[0.0] * 8], [1] * 8)
        for seed in range(60)
    ]
    outside = [not each.low < 0 < each.high for each in found]
    assert outside == [each.p_value < 0.05 for each in found]
    assert 10 < sum(outside) < 50
