"""The critical value for a variance of two parts, against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chi2, norm, t

from loracle.analysis.stats.difference import critical_value, difference_of

MANY = 10**7  # examples enough that their part of the variance is known
SHARES = (0.0, 0.05, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)


def missed_percent(share: float, *, num_seeds: int, tail: float = 0.025, rule=critical_value):
    """How often the interval misses if seeds contribute ``share`` of the true variance.

    The estimate of the seeds' part is a chi-square over its degrees of freedom; given it, the
    difference is normal. The integral over the chi-square is a sum over its quantiles.
    """
    quantiles = (np.arange(4000) + 0.5) / 4000
    part = chi2.ppf(quantiles, num_seeds - 1) / (num_seeds - 1)
    variance = share * part + 1 - share
    seen = share * part / variance
    critical = rule(tail, seed_share=seen, num_seeds=num_seeds, num_examples=MANY)
    return float(100 * 2 * norm.sf(critical * np.sqrt(variance)).mean())


def satterthwaite(tail, *, seed_share, num_seeds, num_examples):
    return t.isf(tail, 1 / (seed_share**2 / (num_seeds - 1) + (1 - seed_share) ** 2 / num_examples))


def cochran(tail, *, seed_share, num_seeds, num_examples):
    return seed_share * t.isf(tail, num_seeds - 1) + (1 - seed_share) * t.isf(tail, num_examples)


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("share", SHARES)
def test_the_interval_misses_as_often_as_it_says_whatever_the_seeds_contribute(share, num_seeds):
    assert 3.0 < missed_percent(share, num_seeds=num_seeds) < 5.5


@pytest.mark.parametrize("share", SHARES)
def test_with_two_seeds_it_is_rougher(share):
    assert 2.7 < missed_percent(share, num_seeds=2) < 6.9


def test_satterthwaite_misses_more_than_it_says_and_cochran_less():
    of_satterthwaite, of_cochran = (
        [missed_percent(share, num_seeds=3, rule=rule) for share in SHARES]
        for rule in (satterthwaite, cochran)
    )
    assert max(of_satterthwaite) == pytest.approx(7.8, abs=0.1)
    assert min(of_cochran) == pytest.approx(2.9, abs=0.1)
    assert max(of_cochran) < 5.1


def test_the_table_in_the_module_is_right():
    shown = {0: 5.0, 0.2: 3.5, 0.4: 3.4, 0.6: 3.9, 0.8: 4.6, 0.9: 5.1, 0.95: 5.2, 1: 5.0}
    for share, percent in shown.items():
        assert missed_percent(share, num_seeds=3) == pytest.approx(percent, abs=0.06)


@pytest.mark.parametrize("share", SHARES)
def test_at_the_strictest_level_of_holm_over_eight_it_misses_at_most_twice_as_often(share):
    assert missed_percent(share, num_seeds=3, tail=0.025 / 8) < 2 * 100 * 0.05 / 8


@pytest.mark.parametrize(("seeds", "examples", "df"), [(1.0, 0.0, 2), (0.0, 1.0, 99)])
def test_a_variance_of_one_part_has_students_t_of_that_part(seeds, examples, df):
    found = difference_of(
        0.3, seed_variance=0.01 * seeds, example_variance=0.01 * examples, num_seeds=3,
        num_examples=100,
    )  # fmt: skip
    assert found.degrees_of_freedom == df
    assert found.standard_error == pytest.approx(0.1)
    assert found.high == pytest.approx(0.3 + 0.1 * t.ppf(0.975, df))
    assert found.low == pytest.approx(0.3 - 0.1 * t.ppf(0.975, df))
    assert found.p_value == pytest.approx(2 * t.sf(3, df), rel=1e-6)
    assert found.seed_share == seeds
    visible = (t.ppf(0.975, df) + t.ppf(0.8, df)) * 0.1
    assert found.smallest_effect_at(0.05) == pytest.approx(visible)


def both(estimate: float, **kwargs):
    design = {"seed_variance": 1.0, "example_variance": 3.0, "num_seeds": 3, "num_examples": 100}
    return difference_of(estimate, **design | kwargs)


def test_the_degrees_of_freedom_give_the_interval_back():
    found = both(0.0)
    assert 2 < found.degrees_of_freedom < 99
    assert found.high == pytest.approx(2 * t.ppf(0.975, found.degrees_of_freedom))


def test_zero_is_at_the_end_of_the_interval_exactly_if_p_is_what_the_interval_leaves_out():
    for coverage in (0.5, 0.95, 0.999):
        half_width = both(0.0, coverage=coverage).high
        found = both(half_width, coverage=coverage)
        assert found.low == pytest.approx(0, abs=1e-12)
        assert found.p_value == pytest.approx(1 - coverage, rel=1e-6)


def test_p_falls_with_the_difference_and_never_to_zero():
    values = [both(estimate).p_value for estimate in (0.0, 1.0, 5.0, 50.0, 1e4, 1e30)]
    assert values[0] == pytest.approx(1)
    assert all(p > q > 0 for p, q in pairwise(values))


def test_a_difference_and_its_opposite_have_the_same_p():
    assert both(-3.0).p_value == both(3.0).p_value


def test_one_seed_or_one_example_has_no_interval():
    for few in ({"num_seeds": 1}, {"num_examples": 1}):
        found = both(0.4, **few)
        assert found.estimate == 0.4
        assert (found.standard_error, found.low, found.high, found.p_value) == (None,) * 4
        assert found.smallest_effect_at(0.05) is None
        assert found.degrees_of_freedom is None


def test_no_noise_is_certainty_about_these_runs_and_says_nothing_about_the_design():
    same = both(0.0, seed_variance=0.0, example_variance=0.0)
    assert (same.low, same.high, same.standard_error, same.p_value) == (0, 0, 0, 1)
    other = both(0.2, seed_variance=0.0, example_variance=0.0)
    assert (other.low, other.high) == (0.2, 0.2)
    assert 0 < other.p_value < 1e-20
    assert same.smallest_effect_at(0.05) is other.smallest_effect_at(0.05) is None


def test_a_stricter_level_needs_a_larger_effect():
    found = both(0.0)
    assert found.smallest_effect_at(0.05 / 8) > found.smallest_effect_at(0.05)
    assert math.isfinite(found.smallest_effect_at(1e-6))


@pytest.mark.parametrize(("seeds", "variance"), [(1, 1.0), (3, 0.0), (3, 1.0)])
def test_every_difference_knows_the_coverage_asked_for(seeds, variance):
    found = difference_of(
        0.5,
        seed_variance=variance,
        example_variance=variance,
        num_seeds=seeds,
        num_examples=9,
        coverage=0.8,
    )
    assert found.coverage == 0.8
