"""What each arm costs, as bars with their spread over runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from loracle.costs import AXES, MEMORY_KINDS, Axis, Cost, arm_costs, kind_of_memory
from loracle.report.study.numbers import decimals_for, fixed, typographic
from loracle.report.study.palette import SHADE
from loracle.report.study.vega import Figure, Spec, category, missing, quantity, values
from loracle.study_record import RunRecord, StudyRecord

_WIDTH_PX, _ROW_PX = 300, 22


def costs_of(study: StudyRecord, axis: Axis) -> dict[str, Cost]:
    """Returns a cost of every arm that measured it, in the study's order."""
    found = {arm.name: arm_costs(study, arm.name).get(axis) for arm in study.arms}
    return {arm: cost for arm, cost in found.items() if cost}


def axis_label(axis: Axis) -> str:
    """Returns the name of a cost with its unit."""
    name, unit = AXES[axis]
    return f"{name}, {unit}" if unit else name


def memory_kind(runs: Sequence[RunRecord]) -> str:
    """Returns what the memory figures are of, in words."""
    kinds = dict.fromkeys(kind_of_memory(run.result) for run in runs)
    return ", ".join(MEMORY_KINDS.get(kind, kind) for kind in kinds)


def how_measured(runs: Sequence[RunRecord]) -> str:
    """Returns how clock and memory were measured, in words; never shared with other arms."""
    return ", ".join(dict.fromkeys(run.result["efficiency"]["measured"] for run in runs))


def how_clocked(study: StudyRecord) -> str:
    """Returns how step times were taken, in a sentence."""
    if study.clock is None:
        return "Step time: the median of each run's clocked steps, then over runs."
    apart = [arm.name for arm in study.arms if arm.name not in study.clock.step_time_s]
    words = (
        f"Step time: arms in turn over the same {study.clock.num_rounds} batches, as a ratio to "
        f"{study.reference}'s; quartiles"
    )
    return f"{words}; of {', '.join(apart)}, its runs' own." if apart else f"{words}."


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
    read = [run.result["efficiency"]["latency_ms_per_token"]["base"] for run in study.runs]
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
    lacking = f" Not measured for {', '.join(absent)}." if absent else ""
    return Figure(
        name,
        title,
        caption=f"{_what_is_shown(study, axis)} {note}{lacking}",
        spec={
            "width": _WIDTH_PX,
            "height": _ROW_PX * len(costs),
            "layer": _bar_layers(costs, label=axis_label(axis)),
        },
    )


def range_words(study: StudyRecord, axis: Axis) -> str:
    """Returns what a line beside a cost spans."""
    in_turn = axis == "step_time_s" and study.clock
    return "quartiles over rounds" if in_turn else "lowest to highest run"


def _what_is_shown(study: StudyRecord, axis: Axis) -> str:
    of = "rounds" if axis == "step_time_s" and study.clock else "an arm's runs"
    return f"Bars: median over {of}; lines: {range_words(study, axis)}."


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
