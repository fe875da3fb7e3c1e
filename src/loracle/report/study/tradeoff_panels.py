"""The trade-offs of a study: their panels, their table, and what to take under a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loracle.costs import AXES, Axis
from loracle.recommendation import recommend
from loracle.report.study.cost_charts import axis_label, costs_of, range_words
from loracle.report.study.numbers import NOT_MEASURED
from loracle.report.study.tables import Column, Table
from loracle.report.study.tradeoff_charts import Point, tradeoff_figure
from loracle.report.study.vega import Figure
from loracle.study_record import StudyRecord
from loracle.tradeoffs import ParetoArm, pareto
from loracle.verdicts import Verdicts
from loracle.words import plural


def tradeoff_figures(study: StudyRecord, verdicts: Verdicts) -> list[Figure]:
    """Returns one panel per cost."""
    return [
        tradeoff_figure(
            f"tradeoff-{axis.replace('_', '-')}",
            [point for arm in pareto(study, verdicts, axis) if (point := _point(arm, verdicts))],
            title=AXES[axis][0],
            label=axis_label(axis),
            reference=verdicts.reference,
            spans=range_words(study, axis),
        )
        for axis in AXES
    ]


def _point(arm: ParetoArm, verdicts: Verdicts) -> Point | None:
    """Returns an arm's point; None if it cannot be compared with the reference."""
    is_reference = arm.arm == verdicts.reference
    difference = arm.comparison.difference if arm.comparison else None
    difference = 0.0 if is_reference else difference
    if difference is None:
        return None
    low, high = (arm.comparison and arm.comparison.interval) or (None, None)
    return Point(
        arm=arm.arm,
        cost=arm.cost.median,
        cost_low=arm.cost.low,
        cost_high=arm.cost.high,
        difference=difference,
        low=low,
        high=high,
        state=arm.state,
    )


def tradeoff_table(study: StudyRecord, verdicts: Verdicts, *, provenance: str) -> Table:
    """Returns every arm's state on every cost."""
    states = {
        axis: {arm.arm: _state(arm) for arm in pareto(study, verdicts, axis)} for axis in AXES
    }
    return Table(
        name="tradeoffs",
        caption="Efficient: every arm is established to cost more or to have a higher loss. "
        "Dominated: another arm is established to cost no more and to have a lower loss. "
        "Undecided: another arm may cost no more and may be as good. Costs are compared seed by "
        "seed or round by round. All pairs are compared directly, Holm "
        f"over all pairs; against the reference, a verdict above counts too. {provenance}.",
        columns=(
            Column("arm", align="left"),
            *(Column(AXES[axis][0], align="left") for axis in AXES),
        ),
        rows=tuple(
            (arm.name, *(states[axis].get(arm.name, NOT_MEASURED) for axis in AXES))
            for arm in study.arms
        ),
        marks=tuple("reference" if arm.name == study.reference else "" for arm in study.arms),
    )


def _state(arm: ParetoArm) -> str:
    if not arm.rivals:
        return arm.state
    rivals = arm.rivals[0] if len(arm.rivals) == 1 else plural(len(arm.rivals), "arm")
    return f"{arm.state} by {rivals}" if arm.state == "dominated" else f"{arm.state} ({rivals})"


def advice(study: StudyRecord, verdicts: Verdicts) -> list[str]:
    """Returns what to take without a limit, and under a limit of memory and of time.

    A limit lies half-way between the cheapest and the dearest arm: it lets some arms in and
    keeps others out. Where costs hardly differ there is none.
    """
    sentences = [_sentence(recommend(study, verdicts).words)]
    memory, time = _half_way(study, "peak_memory_gib"), _half_way(study, "step_time_s")
    if memory is not None:
        sentences.append(_sentence(recommend(study, verdicts, max_memory_gib=memory).words))
    if time is not None:
        sentences.append(_sentence(recommend(study, verdicts, max_step_time_s=time).words))
    return sentences


def _half_way(study: StudyRecord, axis: Axis) -> float | None:
    medians: Sequence[float] = [cost.median for cost in costs_of(study, axis).values()]
    if len(medians) < 2 or max(medians) < 1.1 * min(medians):
        return None
    middle = (min(medians) + max(medians)) / 2
    step: float = 10.0 ** (math.floor(math.log10(middle)) - 1)
    return round(math.ceil(middle / step) * step, 10)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] if words.startswith("within") else words
