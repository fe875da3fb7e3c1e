"""Predicted beside measured memory and step times of the arms."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from loracle.analysis.costs import step_in_turn
from loracle.records.predictions import ArmAccuracy, kept_accuracy
from loracle.records.result import MEMORY_KINDS
from loracle.records.study_folder import StudyRecord
from loracle.report.tables.table import Column, Table
from loracle.report.text.numbers import fixed, signed
from loracle.text import plural


def predicted_table(study: StudyRecord) -> Table | None:
    """Returns the table; None if nothing was predicted."""
    accuracies = kept_accuracy(study.path)
    if not accuracies:
        return None
    ratios = _ratios(study, accuracies)
    times = f"times {study.reference}"
    beside = (Column("step predicted", times), Column("in turn", times))
    return Table(
        name="predicted",
        caption=_caption(accuracies, in_turn=bool(ratios)),
        columns=(
            Column("arm", align="left"),
            Column("memory predicted", "GiB"),
            Column("measured", "GiB"),
            Column("error", "%"),
            Column("step predicted", "s"),
            Column("measured", "s"),
            Column("error", "%"),
            *(beside if ratios else ()),
        ),
        rows=tuple(
            (
                row.arm,
                fixed(row.predicted_gib, decimals=3),
                fixed(row.measured_gib, decimals=3),
                _percent(row.memory_error_frac),
                fixed(row.predicted_step_s, decimals=3),
                fixed(row.measured_step_s, decimals=3),
                _percent(row.time_error_frac),
                *(fixed(ratio, decimals=2) for ratio in ratios.get(row.arm, ())),
            )
            for row in accuracies
        ),
        marks=tuple("reference" if row.arm == study.reference else "" for row in accuracies),
    )


def _ratios(
    study: StudyRecord, accuracies: Sequence[ArmAccuracy]
) -> dict[str, tuple[float | None, float | None]]:
    """Returns each arm's step time over the reference's, predicted and clocked in turn.

    Empty without a predicted and a clocked time of the reference.
    """
    predicted = {row.arm: row.predicted_step_s for row in accuracies}
    reference = predicted.get(study.reference)
    clocked = step_in_turn(study, study.reference)
    if reference is None or clocked is None:
        return {}
    ratios = {}
    for arm, seconds in predicted.items():
        cost = step_in_turn(study, arm)
        ratios[arm] = (
            None if seconds is None else seconds / reference,
            None if cost is None else cost.median / clocked.median,
        )
    return ratios


def _caption(accuracies: Sequence[ArmAccuracy], *, in_turn: bool) -> str:
    kinds = sorted({MEMORY_KINDS[row.memory_kind] for row in accuracies})
    words = [
        (
            "What loracle plan says of a step of each arm's first run, traced without weights, "
            f"beside what was measured of it. Memory: {', '.join(kinds)}"
        )
    ]
    for name, errors in (
        ("memory", [row.memory_error_frac for row in accuracies]),
        ("time", [row.time_error_frac for row in accuracies]),
    ):
        errors_frac = [abs(error) for error in errors if error is not None]
        if errors_frac:
            words.append(
                f"error of {name}: median {100 * statistics.median(errors_frac):.1f} %, at most "
                f"{100 * max(errors_frac):.1f} % of {plural(len(errors_frac), 'arm')}"
            )
    if dates := sorted({row.speed_measured_at for row in accuracies if row.speed_measured_at}):
        words.append(f"times rest on the device's speed as measured on {', '.join(dates)}")
    else:
        words.append("no time is predicted without a measurement of the device's speed")
    if in_turn:
        words.append(
            "a device's speed may change between runs, so the last columns compare arms that "
            "took steps in turn"
        )
    return "; ".join(words) + "."


def _percent(frac: float | None) -> str:
    return signed(None if frac is None else 100 * frac, decimals=1)
