"""Costs of the arms as bars, with their spread over runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from loracle.analysis.costs import AXES, Axis, Cost, costs_of
from loracle.records.study_folder import StudyRecord
from loracle.report.figures.palette import SHADE
from loracle.report.figures.vega import Figure, Spec, category, missing, quantity, values
from loracle.report.text.costs import (
    axis_label,
    how_clocked,
    how_measured,
    memory_kind,
    range_words,
)
from loracle.report.text.numbers import decimals_for, fixed, typographic

_WIDTH_PX, _ROW_PX = 300, 22


def cost_figures(study: StudyRecord) -> list[Figure]:
    """Returns the bars of memory, step time and latency."""
    where = f"Measured on: {how_measured(study.runs)}."
    clocked = how_clocked(study)
    notes: dict[Axis, str] = {
        "peak_memory_gib": f"Kind: {memory_kind(study.runs)}. {where}",
        "step_time_s": clocked if study.clock else f"{clocked} {where}",
        "latency_ms_per_token": f"{_base_latency(study)} {where}",
    }
    return [_bars(study, axis, note=note) for axis, note in notes.items()]


def _base_latency(study: StudyRecord) -> str:
    read = [run.result.efficiency.latency_ms_per_token.base for run in study.runs]
    measured = [value for value in read if value is not None]
    if not measured:
        return "The base alone was not measured."
    return f"The base alone takes {statistics.median(measured):.1f} ms per token."


def _bars(study: StudyRecord, axis: Axis, *, note: str) -> Figure:
    name, words = f"cost-{axis.replace('_', '-')}", AXES[axis][0]
    title = words[0].upper() + words[1:]
    costs = costs_of(study, axis)
    if not costs:
        return missing(name, title, why=f"No completed run measured the {words}.")
    absent = [arm.name for arm in study.arms if arm.name not in costs]
    over = "rounds" if axis == "step_time_s" and study.clock else "an arm's runs"
    lacking = f" Not measured for {', '.join(absent)}." if absent else ""
    return Figure(
        name,
        title,
        caption=f"Bars: median over {over}; lines: {range_words(study, axis)}. {note}{lacking}",
        spec={
            "width": _WIDTH_PX,
            "height": _ROW_PX * len(costs),
            "layer": _bar_layers(costs, label=axis_label(axis)),
        },
    )


def _bar_layers(costs: Mapping[str, Cost], *, label: str) -> list[Spec]:
    decimals = decimals_for(cost.median for cost in costs.values())
    rows = [
        {
            "arm": arm,
            "median": cost.median,
            "low": cost.low,
            "high": cost.high,
            "shown": typographic(fixed(cost.median, decimals=decimals)),
        }
        for arm, cost in costs.items()
    ]
    arm = category("arm", None, sort=list(costs), axis={"ticks": False})
    axis = {"labelOverlap": True, "tickCount": 6}
    tooltip = [
        category("arm", "arm"),
        *(quantity(key, key, format=f",.{decimals}f") for key in ("median", "low", "high")),
    ]
    bar: Spec = {
        "mark": {"type": "bar", "color": SHADE, "fillOpacity": 0.55, "height": {"band": 0.62}},
        "encoding": {"y": arm, "x": quantity("median", label, axis=axis), "tooltip": tooltip},
    }
    spread: Spec = {
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "encoding": {"y": arm, "x": quantity("low", label), "x2": {"field": "high"}},
    }
    text: Spec = {
        "mark": {"type": "text", "align": "left", "dx": 6},
        "encoding": {
            "y": arm,
            "x": quantity("high", label),
            "text": {"field": "shown", "type": "nominal"},
        },
    }
    return [{"data": values(rows), **layer} for layer in (bar, spread, text)]
