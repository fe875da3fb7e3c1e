"""The trade-offs of a study: their panels, their table, and what to take under a limit."""

from __future__ import annotations

from loracle.analysis.costs import AXES
from loracle.analysis.tradeoffs import Fronts, ParetoArm
from loracle.records.study_folder import StudyRecord
from loracle.report.tables.table import Column, Table
from loracle.report.text.answer import at_one_rate
from loracle.report.text.numbers import NOT_MEASURED
from loracle.text import plural


def tradeoff_table(study: StudyRecord, fronts: Fronts, *, provenance: str) -> Table:
    """Returns every arm's state on every cost."""
    states = {axis: {arm.arm: _state(arm) for arm in front} for axis, front in fronts.items()}
    return Table(
        name="tradeoffs",
        caption="Efficient: every arm is established to cost more or to have a higher loss. "
        "Dominated: another arm is established to cost no more and to have a lower loss. "
        "Undecided: another arm may cost no more and may be as good. Costs are compared seed by "
        "seed or round by round. All pairs are compared directly, Holm "
        f"over all pairs; against the reference, a verdict above counts too."
        f"{at_one_rate(study)} {provenance}.",
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
