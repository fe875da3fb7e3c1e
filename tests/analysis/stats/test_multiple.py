"""Holm's adjusted p-values, by hand and by what must hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.analysis.stats.multiple import holm

P_VALUES = st.lists(st.none() | st.floats(0, 1), max_size=12)


def test_a_hand_computed_example():
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06, 0.04 x 1 raised to 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_the_largest_is_one_at_most():
    assert holm([0.4, 0.6, 0.9]) == [1.0, 1.0, 1.0]


def test_one_comparison_is_not_corrected():
    assert holm([0.03]) == [0.03]


def test_a_comparison_that_was_not_made_stays_out_and_does_not_count():
    assert holm([None, 0.02, None, 0.03]) == [None, 0.04, None, 0.04]
    assert holm([]) == []
    assert holm([None]) == [None]


@given(P_VALUES)
def test_it_keeps_the_order_and_never_lowers_a_p_value(p_values):
    adjusted = holm(p_values)
    made = sorted((p, q) for p, q in zip(p_values, adjusted, strict=True) if p is not None)
    assert all(p <= q <= 1 for p, q in made)
    assert [q for _, q in made] == sorted(q for _, q in made)
    assert [p is None for p in p_values] == [q is None for q in adjusted]


@given(P_VALUES, st.floats(0.001, 0.5))
def test_it_rejects_what_the_step_down_test_rejects(p_values, alpha):
    made = sorted(p for p in p_values if p is not None)
    rejected = 0
    while rejected < len(made) and (len(made) - rejected) * made[rejected] <= alpha:
        rejected += 1
    found = [q for q in holm(p_values) if q is not None and q <= alpha]
    assert len(found) == rejected


@given(P_VALUES)
def test_it_is_never_less_powerful_than_bonferroni(p_values):
    size = sum(p is not None for p in p_values)
    for p, q in zip(p_values, holm(p_values), strict=True):
        assert p is None or q <= min(1.0, size * p)
