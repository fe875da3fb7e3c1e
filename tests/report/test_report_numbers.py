"""Numbers as text: the same digits, signs, and n/a for what was not measured."""

import pytest

from loracle.report.text.numbers import (
    count,
    decimals_for,
    fixed,
    interval,
    p_value,
    percent,
    signed,
    typographic,
    with_interval,
)
from loracle.text import plural


def test_what_was_not_measured_is_never_zero():
    assert fixed(None, decimals=2) == signed(None, decimals=2) == "n/a"
    assert interval(None, 1.0, decimals=2) == interval(0.0, None, decimals=2) == "n/a"
    assert p_value(None) == count(None) == percent(None) == "n/a"
    assert with_interval(None, None, None, decimals=2) == "n/a"


def test_zero_is_a_number():
    assert fixed(0.0, decimals=2) == "0.00"
    assert signed(0.0, decimals=2) == "0.00"
    assert count(0) == "0"


def test_a_difference_that_rounds_to_zero_has_no_sign():
    assert signed(-0.00004, decimals=4) == "0.0000"
    assert signed(0.00004, decimals=4) == "0.0000"
    assert signed(-0.00006, decimals=4) == "-0.0001"
    assert signed(0.5, decimals=1) == "+0.5"


def test_an_interval_has_both_ends_and_their_signs():
    shown = with_interval(-0.0123, -0.02, 0.001, decimals=4)
    assert shown == "-0.0123 [-0.0200, +0.0010]"


def test_a_difference_without_an_interval_says_so():
    assert with_interval(0.01, None, None, decimals=4) == "+0.0100 (no interval)"


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0004, "< 0.001"), (0.001, "0.001"), (0.25, "0.250"), (1.0, "1.000")]
)
def test_p_values_have_three_decimals(value, shown):
    assert p_value(value) == shown


def test_thousands_are_set_apart():
    assert count(4_884_480) == "4,884,480"
    assert fixed(1234.5, decimals=1) == "1,234.5"


def test_percent_takes_a_fraction():
    assert percent(0.016) == "1.6 %"
    assert percent(-0.003, sign=True) == "-0.3 %"


@pytest.mark.parametrize(
    ("values", "decimals"), [([5.2, 3.1], 2), ([0.045, 2.0], 4), ([450.0], 0), ([None, 0.0], 2)]
)
def test_the_smallest_value_of_a_column_decides_its_decimals(values, decimals):
    assert decimals_for(values) == decimals


def test_only_the_sign_of_a_number_becomes_a_minus():
    assert typographic("-0.5 [-1, +2]") == "\N{MINUS SIGN}0.5 [\N{MINUS SIGN}1, +2]"
    assert typographic("last-8 2026-11-23") == "last-8 2026-11-23"


def test_one_thing_is_singular():
    assert plural(1, "seed") == "1 seed"
    assert plural(1200, "example") == "1,200 examples"
