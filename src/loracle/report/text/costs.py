"""Sentences on how costs were measured."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.analysis.costs import AXES, Axis
from loracle.records.result import MEMORY_KINDS
from loracle.records.study_folder import RunRecord, StudyRecord


def axis_label(axis: Axis) -> str:
    """Returns the name of a cost with its unit."""
    name, unit = AXES[axis]
    return f"{name}, {unit}" if unit else name


def memory_kind(runs: Sequence[RunRecord]) -> str:
    """Returns what the memory figures measure."""
    kinds = dict.fromkeys(run.result.efficiency.peak_memory_gib.kind_of_training for run in runs)
    return ", ".join(MEMORY_KINDS.get(kind, kind) for kind in kinds)


def how_measured(runs: Sequence[RunRecord]) -> str:
    """Returns in which steps time and memory were measured."""
    return ", ".join(dict.fromkeys(run.result.efficiency.measured for run in runs))


def how_clocked(study: StudyRecord) -> str:
    """Returns a sentence on how step times were measured."""
    if study.clock is None:
        return "Step time: the median of each run's clocked steps, then over runs."
    apart = [arm.name for arm in study.arms if arm.name not in study.clock.step_time_s]
    words = (
        f"Step time: arms in turn over the same {study.clock.num_rounds} batches, as a ratio to "
        f"{study.reference}'s; quartiles"
    )
    return f"{words}; of {', '.join(apart)}, its runs' own." if apart else f"{words}."


def range_words(study: StudyRecord, axis: Axis) -> str:
    """Returns what the error line of a cost spans."""
    in_turn = axis == "step_time_s" and study.clock
    return "quartiles over rounds" if in_turn else "lowest to highest run"
