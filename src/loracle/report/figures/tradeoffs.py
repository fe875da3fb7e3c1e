"""Loss against each cost, one panel per cost, with labels that do not overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loracle.analysis.costs import AXES
from loracle.analysis.tradeoffs import Fronts, ParetoArm
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord
from loracle.report.figures.palette import BAD, GOOD, INK, OPEN
from loracle.report.figures.vega import Figure, Spec, category, missing, quantity, values
from loracle.report.text.costs import axis_label, range_words
from loracle.report.text.numbers import (
    LOSS_DECIMALS,
    decimals_for,
    fixed,
    interval_words,
    with_interval,
)

_WIDTH_PX, _HEIGHT_PX, _LABEL_PX = 300, 270, 13

_GUTTER_PX = 8

# assumed: within this share of each other, costs are one cost and there is nothing to trade
_SAME_COST_FRAC = 0.05

# assumed: costs further apart than this are read better on a logarithmic axis
_LOG_FROM_RATIO = 12.0

_STATES: Mapping[str, tuple[str, str]] = {
    "efficient": (GOOD, "circle"),
    "undecided": (BAD, "diamond"),
    "dominated": (OPEN, "cross"),
}

Row = dict[str, Any]
"""An arm in the plane of loss and cost."""


def tradeoff_figure(
    name: str,
    arms: Sequence[ParetoArm],
    *,
    title: str,
    label: str,
    reference: str,
    coverage: float,
    spans: str = "lowest to highest run",
) -> Figure:
    """Returns the panel of one cost, or the sentence why there is nothing to trade.

    Args:
        name: Stem of its files.
        arms: An arm without a difference from the reference is left out.
        title: Name of the cost.
        label: Title with unit, for the axis.
        reference: The arm at zero.
        coverage: Of the vertical lines.
        spans: What a horizontal line shows.
    """
    points = [_row(arm) for arm in arms if arm.difference is not None]
    heading = f"Loss against {title}"
    if len(points) < 2:
        why = f"Fewer than two arms have both a measured {title} and a loss to compare."
        return missing(name, heading, why=why)
    lowest, highest = min(p["cost"] for p in points), max(p["cost"] for p in points)
    if highest - lowest <= _SAME_COST_FRAC * highest:
        return missing(name, heading, why=_same_cost(title, lowest, highest))
    return Figure(
        name,
        heading,
        caption="Lower and further left is better. Vertical lines: "
        f"{interval_words(coverage)} of the loss difference; horizontal: {spans}.",
        spec=_panel(points, label=label, reference=reference),
    )


def _same_cost(title: str, lowest: float, highest: float) -> str:
    decimals = 0 if lowest > 1000 else decimals_for([lowest])
    low, high = fixed(lowest, decimals=decimals), fixed(highest, decimals=decimals)
    return (
        f"All arms have nearly the same {title} ({low} to {high}), so there is nothing to trade "
        f"against the loss."
    )


def _panel(points: Sequence[Row], *, label: str, reference: str) -> Spec:
    x_domain = _cost_domain(points)
    ends = [p[key] for p in points for key in ("difference", "low", "high") if p[key] is not None]
    margin = 0.06 * (max(ends) - min(ends)) or 1e-3
    y_domain = min(ends) - margin, max(ends) + margin
    logarithmic = x_domain[0] > 0 and x_domain[1] / x_domain[0] > _LOG_FROM_RATIO
    scale = {"domain": list(x_domain), "nice": False, "type": "log" if logarithmic else "linear"}
    axis: Spec = {"labelOverlap": True, "tickCount": 5}
    if x_domain[1] > 1000:
        axis["format"] = "~s"
    x = {"title": label, "scale": scale, "axis": axis}
    y = {
        "title": f"loss minus {reference}'s, nats per token",
        "scale": {"domain": list(y_domain), "nice": False, "zero": False},
    }
    return {
        "width": _WIDTH_PX,
        "height": _HEIGHT_PX,
        "layer": [
            *_leader_layers(points, x=x, y=y, right=x_domain[1], y_domain=y_domain),
            *_spread_layers(points, x=x, y=y),
            _dots(points, x=x, y=y),
        ],
    }


def _cost_domain(points: Sequence[Row]) -> tuple[float, float]:
    low, high = min(p["cost_low"] for p in points), max(p["cost_high"] for p in points)
    if low > 0 and high / low > _LOG_FROM_RATIO:
        return low / 1.3, high * 1.3
    margin = 0.08 * (high - low)
    return max(0.0, low - margin), high + margin


def _leader_layers(
    points: Sequence[Row],
    *,
    x: Spec,
    y: Spec,
    right: float,
    y_domain: tuple[float, float],
) -> list[Spec]:
    """Returns the names in a column right of the plot, each with a thin line to its point."""
    per_px = (y_domain[1] - y_domain[0]) / _HEIGHT_PX
    heights = spread(
        [p["difference"] for p in points],
        gap=_LABEL_PX * per_px,
        low=y_domain[0],
        high=y_domain[1],
    )
    ends = [
        {"arm": point["arm"], "cost": cost, "loss": loss, "end": end}
        for point, height in zip(points, heights, strict=True)
        for end, (cost, loss) in enumerate(((point["cost"], point["difference"]), (right, height)))
    ]
    lines: Spec = {
        "data": values(ends),
        "mark": {"type": "line", "color": INK, "strokeWidth": 0.6, "opacity": 0.35},
        "encoding": {
            "x": quantity("cost", **x),
            "y": quantity("loss", **y),
            "detail": {"field": "arm", "type": "nominal"},
            "order": {"field": "end", "type": "quantitative"},
        },
    }
    names: Spec = {
        "data": values([row for row in ends if row["end"]]),
        "mark": {"type": "text", "align": "left", "baseline": "middle", "color": INK},
        "encoding": {
            "x": {"value": _WIDTH_PX + _GUTTER_PX},
            "y": quantity("loss", **y),
            "text": {"field": "arm", "type": "nominal"},
        },
    }
    return [lines, names]


def spread(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Returns the nearest positions that keep their order, ``gap`` apart, within low and high.

    Least squares by pooling neighbours that are too close (isotonic regression of the positions
    minus their gaps). Where there is no room for all, the gap shrinks.
    """
    count = len(positions)
    gap = min(gap, (high - low) / max(1, count - 1))
    order = sorted(range(count), key=lambda index: (positions[index], index))
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([positions[index] - rank * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    pooled = [_mean(pool) for pool in pools for _ in pool]
    highest = high - (count - 1) * gap
    placed = [0.0] * count
    for rank, index in enumerate(order):
        placed[index] = min(max(pooled[rank], low), max(low, highest)) + rank * gap
    return placed


def _mean(pool: Sequence[float]) -> float:
    return sum(pool) / len(pool)


def _spread_layers(points: Sequence[Row], *, x: Spec, y: Spec) -> list[Spec]:
    layers: list[Spec] = [
        {
            "data": values(points),
            "mark": {"type": "rule", "strokeWidth": 1.3, "opacity": 0.8},
            "encoding": {
                "x": quantity("cost_low", **x),
                "x2": {"field": "cost_high"},
                "y": quantity("difference", **y),
                "color": _state_colour(),
            },
        }
    ]
    drawn = [point for point in points if point["low"] is not None]
    if drawn:
        layers.append(
            {
                "data": values(drawn),
                "mark": {"type": "rule", "strokeWidth": 1.3, "opacity": 0.8},
                "encoding": {
                    "x": quantity("cost", **x),
                    "y": quantity("low", **y),
                    "y2": {"field": "high"},
                    "color": _state_colour(),
                },
            }
        )
    return layers


def _dots(points: Sequence[Row], *, x: Spec, y: Spec) -> Spec:
    return {
        "data": values(points),
        "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
        "encoding": {
            "x": quantity("cost", **x),
            "y": quantity("difference", **y),
            "color": _state_colour(),
            "shape": category(
                "state", None, scale=_state_scale(1), legend={"orient": "bottom", "symbolSize": 75}
            ),
            "tooltip": [
                category("arm", "arm"),
                category("state", "state"),
                category("shown", "nats per token"),
                category("cost_shown", str(x["title"])),
            ],
        },
    }


def _row(arm: ParetoArm) -> Row:
    cost = arm.cost.median
    low, high = (arm.comparison and arm.comparison.interval) or (None, None)
    return {
        "arm": arm.arm,
        "cost": cost,
        "cost_low": arm.cost.low,
        "cost_high": arm.cost.high,
        "difference": arm.difference,
        "low": low,
        "high": high,
        "state": arm.state,
        "shown": with_interval(arm.difference, low, high, decimals=LOSS_DECIMALS),
        "cost_shown": fixed(cost, decimals=0 if cost > 1000 else decimals_for([cost])),
    }


def _state_colour() -> Spec:
    legend = {"orient": "bottom", "symbolSize": 75}
    return category("state", None, scale=_state_scale(0), legend=legend)


def _state_scale(part: int) -> Spec:
    return {"domain": list(_STATES), "range": [look[part] for look in _STATES.values()]}


def tradeoff_figures(study: StudyRecord, verdicts: Verdicts, fronts: Fronts) -> list[Figure]:
    """Returns one panel per cost."""
    return [
        tradeoff_figure(
            f"tradeoff-{axis.replace('_', '-')}",
            front,
            title=AXES[axis][0],
            label=axis_label(axis),
            reference=verdicts.reference,
            coverage=verdicts.coverage,
            spans=range_words(study, axis),
        )
        for axis, front in fronts.items()
    ]
