"""What a plan says of an arm beside what was measured of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from loracle.costs import MEMORY_KINDS
from loracle.plan.accuracy import ArmAccuracy, kept_accuracy
from loracle.report.study.numbers import NOT_MEASURED
from loracle.report.study.tables import Column, Table
from loracle.study_record import StudyRecord


def predicted_table(study: StudyRecord) -> Table | None:
    """Returns the table; None if nothing was predicted."""
    found = kept_accuracy(study.path)
    if not found:
        return None
    return Table(
        name="predicted",
        caption=_caption(found),
        columns=(
            Column("arm", align="left"),
            Column("memory predicted", "GiB"),
            Column("measured", "GiB"),
            Column("error", "%"),
            Column("step predicted", "s"),
            Column("measured", "s"),
            Column("error", "%"),
        ),
        rows=tuple(
            (
                each.arm,
                f"{each.predicted_gib:.3f}",
                _number(each.measured_gib, 3),
                _percent(each.memory_error_frac),
                _number(each.predicted_step_s, 3),
                _number(each.measured_step_s, 3),
                _percent(each.time_error_frac),
            )
            for each in found
        ),
        marks=tuple("reference" if each.arm == study.reference else "" for each in found),
    )


def _caption(found: Sequence[ArmAccuracy]) -> str:
    kinds = sorted({MEMORY_KINDS[each.memory_kind] for each in found})
    words = [
        (
            "What `loracle plan` says of a step of each arm's first run, traced without weights, "
            f"beside what was measured of it. Memory: {', '.join(kinds)}"
        )
    ]
    for name, errors in (
        ("memory", [each.memory_error_frac for each in found]),
        ("time", [each.time_error_frac for each in found]),
    ):
        known = [abs(error) for error in errors if error is not None]
        if known:
            words.append(
                f"error of {name}: median {100 * statistics.median(known):.1f} %, at most "
                f"{100 * max(known):.1f} % of {len(known)} arms"
            )
    if all(each.predicted_step_s is None for each in found):
        words.append("no time is predicted without a measurement of the device's speed")
    return "; ".join(words) + "."


def _number(value: float | None, decimals: int) -> str:
    return NOT_MEASURED if value is None else f"{value:.{decimals}f}"


def _percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:+.1f}"
