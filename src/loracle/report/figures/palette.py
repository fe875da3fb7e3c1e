"""Colour, dash and shape of the arms, by their position in the study.

The reference has the colour of the text. For nine to twelve arms no palette is enough for
colour-blind readers, so each arm has a dash and a shape too. Paper uses the light colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

INK = "currentColor"

# source (Okabe and Ito 2008; Tol 2021, "muted"), darkened to a contrast of 3:1 on white; beside
# each the shade of the same hue that has it on a dark page.
_COLOURS = (
    ("#332288", "#a79cf5"),
    ("#d55e00", "#ff9550"),
    ("#00886a", "#3fd0a8"),
    ("#b5588f", "#eba9cf"),
    ("#2a84c0", "#74c3f3"),
    ("#882255", "#e07fae"),
    ("#85851f", "#cccc5c"),
    ("#b37400", "#f3bb45"),
    ("#117733", "#62c07d"),
    ("#c24b5c", "#f3929f"),
    ("#7a4b12", "#cfa26b"),
    ("#54687a", "#a3b7ca"),
)
_DASHES = ((1, 0), (6, 2), (2, 2), (7, 2, 2, 2))
_SHAPES = (
    *("square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right"),
    "triangle-left",
)

# Names of CSS variables: light, dark. The verdict colours are Okabe and Ito's blue and vermilion.
MARKS: Mapping[str, tuple[str, str]] = {
    "good": ("#0072b2", "#6cb8ea"),
    "bad": ("#c04f00", "#ff9a5c"),
    "open": ("#6b6b6b", "#a8a8a8"),
    "shade": ("#1f5f99", "#7db8ec"),
}
GOOD, BAD, OPEN, SHADE = (light for light, _ in MARKS.values())


@dataclass(frozen=True)
class Look:
    """How one arm is drawn."""

    colour: str
    """On a light page and on paper."""
    dark: str
    """On a dark page."""
    dash: tuple[int, ...]
    """Lengths of strokes and gaps, in pixels."""
    shape: str
    """Vega's name of its point."""


def looks_of(arms: Sequence[str], *, reference: str) -> dict[str, Look]:
    """Returns each arm's look, in the order of ``arms``."""
    others = [arm for arm in arms if arm != reference]
    looks = {
        arm: Look(
            *_COLOURS[index % len(_COLOURS)],
            dash=_DASHES[(index + index // len(_COLOURS)) % len(_DASHES)],
            shape=_SHAPES[index % len(_SHAPES)],
        )
        for index, arm in enumerate(others)
    }
    looks[reference] = Look(INK, INK, dash=_DASHES[0], shape="circle")
    return {arm: looks[arm] for arm in arms}


def arm_scale(looks: Mapping[str, Look], part: str) -> dict[str, object]:
    """Returns Vega-Lite's scale from arm to its ``colour``, ``dash`` or ``shape``."""
    values = [getattr(look, part) for look in looks.values()]
    return {"domain": list(looks), "range": [list(v) if part == "dash" else v for v in values]}


def css_variables() -> list[tuple[str, str, str]]:
    """Returns the name, light and dark value of every colour that a page sets."""
    arms = [(f"--arm-{index}", *pair) for index, pair in enumerate(_COLOURS)]
    return arms + [(f"--{name}", *pair) for name, pair in MARKS.items()]
