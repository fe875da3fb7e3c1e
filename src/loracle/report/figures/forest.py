"""The forest plot: each arm's difference from the reference, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loracle.analysis.comparison import Comparison
from loracle.report.figures.palette import BAD, GOOD, INK, OPEN
from loracle.report.figures.vega import Figure, Spec, category, missing, quantity, values
from loracle.report.text.numbers import LOSS_DECIMALS, interval_words, with_interval

_WIDTH_PX, _ROW_PX = 460, 26
_VERDICTS: Mapping[str, tuple[str, str]] = {
    "better": (GOOD, "triangle-left"),
    "worse": (BAD, "triangle-right"),
    "not distinguishable": (OPEN, "circle"),
}


def forest_figure(
    comparisons: Sequence[Comparison],
    *,
    reference: str,
    noise_floor: float | None,
    coverage: float,
    note: str = "",
) -> Figure:
    """Returns the forest plot of the loss, a row per comparison; ``note`` ends the caption."""
    name, title = "forest", f"Loss beside {reference}"
    if not comparisons:
        return missing(name, title, why=f"No arm shares a seed with {reference}, so none compares.")
    axis = f"loss minus {reference}'s, nats per token (left of zero: lower loss, better)"
    order = [comparison.arm for comparison in comparisons]
    level = interval_words(coverage) if all(c.interval for c in comparisons) else None
    return Figure(
        name,
        title,
        caption=_caption(level=level, noise_floor=noise_floor) + note,
        spec={
            "width": _WIDTH_PX,
            "height": _ROW_PX * len(comparisons),
            "layer": [
                *_noise_layers(noise_floor, axis),
                _zero(axis),
                *_effect_layers(comparisons, order=order, axis=axis),
            ],
        },
    )


def _caption(*, level: str | None, noise_floor: float | None) -> str:
    dots = (
        f"Dots: difference over paired seeds and examples; lines: {level}s."
        if level
        else "Dots: difference. Where a line is missing there is no interval over seeds."
    )
    if noise_floor is None:
        return f"{dots} The noise floor was not measured."
    if noise_floor == 0:
        return f"{dots} A repeat of the same seed gave the same loss, so the noise floor is zero."
    return f"{dots} Grey band: the noise floor, {noise_floor:.{LOSS_DECIMALS}f} nats either way."


def _noise_layers(noise_floor: float | None, axis: str) -> list[Spec]:
    if not noise_floor:
        return []
    return [
        {
            "data": {"values": [{"low": -noise_floor, "high": noise_floor}]},
            "mark": {"type": "rect", "color": INK, "fillOpacity": 0.1},
            "encoding": {"x": quantity("low", axis), "x2": {"field": "high"}},
        }
    ]


def _zero(axis: str) -> Spec:
    return {
        "data": {"values": [{"difference": 0}]},
        "mark": {"type": "rule", "strokeDash": [3, 3], "opacity": 0.6},
        "encoding": {"x": quantity("difference", axis)},
    }


def _effect_layers(
    comparisons: Sequence[Comparison], *, order: Sequence[str], axis: str
) -> list[Spec]:
    rows = [_row(comparison) for comparison in comparisons]
    drawn = [row for row in rows if row["low"] is not None]
    arm = category("arm", None, sort=list(order), axis={"labelPadding": 6, "ticks": False})
    colour, shape = _verdict_scales()
    lines: Spec = {
        "data": values(drawn),
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {
            "y": arm,
            "x": quantity("low", axis),
            "x2": {"field": "high"},
            "color": colour,
        },
    }
    dots: Spec = {
        "data": values(rows),
        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
        "encoding": {
            "y": arm,
            "x": quantity("difference", axis),
            "color": colour,
            "shape": shape,
            "tooltip": [
                category("arm", "arm"),
                category("shown", "nats per token"),
                category("verdict", "verdict"),
            ],
        },
    }
    return [lines, dots] if drawn else [dots]


def _row(comparison: Comparison) -> dict[str, Any]:
    low, high = comparison.interval or (None, None)
    return {
        "arm": comparison.arm,
        "difference": comparison.difference,
        "low": low,
        "high": high,
        "verdict": comparison.verdict,
        "shown": with_interval(comparison.difference, low, high, decimals=LOSS_DECIMALS),
    }


def _verdict_scales() -> tuple[Spec, Spec]:
    """Returns the encodings of a verdict's colour and shape, with one legend."""
    domain = list(_VERDICTS)
    legend = {"orient": "bottom", "direction": "horizontal", "symbolSize": 80, "columnPadding": 16}
    colours, shapes = zip(*_VERDICTS.values(), strict=True)
    return (
        category("verdict", None, scale={"domain": domain, "range": list(colours)}, legend=legend),
        category("verdict", None, scale={"domain": domain, "range": list(shapes)}, legend=legend),
    )
