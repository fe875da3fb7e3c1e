"""How arms look: told apart without colour, readable on light and dark pages."""

import itertools

import pytest

from loracle.report.figures.palette import INK, arm_scale, css_variables, looks_of

TWELVE = [f"arm-{n}" for n in range(12)]


def luminance(colour):
    """WCAG 2.1's relative luminance."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_twelve_arms_differ_in_more_than_colour():
    looks = looks_of(TWELVE, reference="arm-0").values()
    lines = [(look.colour, look.dash) for look in looks]
    points = [(look.colour, look.shape) for look in looks]
    assert len(set(lines)) == len(set(points)) == len(TWELVE)
    for one, other in itertools.pairwise(looks):
        assert one.dash != other.dash or one.colour == INK
        assert one.shape != other.shape


def test_the_reference_has_the_colour_of_the_text():
    looks = looks_of(TWELVE, reference="arm-3")
    assert looks["arm-3"].colour == INK
    assert list(looks) == TWELVE


def test_a_look_does_not_depend_on_which_arms_follow():
    assert (
        looks_of(TWELVE, reference="arm-0")["arm-4"]
        == (looks_of(TWELVE[:5], reference="arm-0")["arm-4"])
    )


@pytest.mark.parametrize("name_light_dark", css_variables(), ids=lambda row: row[0])
def test_every_colour_stands_out_from_its_page(name_light_dark):
    _, light, dark = name_light_dark
    assert contrast(light, "#ffffff") >= 3
    assert contrast(dark, "#15181c") >= 3


def test_no_two_variables_share_a_light_colour():
    lights = [light for _, light, _ in css_variables()]
    assert len(set(lights)) == len(lights)


def test_a_scale_lists_arms_and_looks_in_one_order():
    looks = looks_of(["b", "a"], reference="a")
    scale = arm_scale(looks, "dash")
    assert scale["domain"] == ["b", "a"]
    assert scale["range"] == [[1, 0], [1, 0]]
