"""What an arm costs: parameters, memory, time, latency and size on the disk, over its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loracle.records.names import ADAPTER, ADAPTER_WEIGHTS
from loracle.records.study_folder import RunRecord, StudyRecord

Axis = Literal[
    "trainable_params", "peak_memory_gib", "step_time_s", "latency_ms_per_token", "adapter_mib"
]

AXES: dict[Axis, tuple[str, str]] = {
    "trainable_params": ("trainable parameters", ""),
    "peak_memory_gib": ("peak memory in training", "GiB"),
    "step_time_s": ("step time", "s"),
    "latency_ms_per_token": ("latency of the unmerged adapter", "ms per token"),
    "adapter_mib": ("adapter size", "MiB"),
}
"""What each axis measures, and its unit."""


# assumed: one clock or one resident set, read again, agrees no better than this.
_RESOLUTION_FRAC = 0.01
_COUNTED: tuple[Axis, ...] = ("trainable_params", "adapter_mib")
_BYTES_PER_PARAM = 4  # adapters are trained and saved in fp32
_MIB = 1024**2


@dataclass(frozen=True)
class Cost:
    """What an arm costs on one axis, over its completed runs."""

    axis: Axis
    """What was measured, with its unit."""
    median: float
    """Over the runs."""
    low: float
    """Of the cheapest run; of steps taken in turn, the lower quartile."""
    high: float
    """Of the dearest run; of steps taken in turn, the upper quartile."""
    values: Mapping[int, float]
    """What was measured, by seed or by round."""
    paired_by: Literal["seed", "round"] = "seed"
    """What arms share: the batches of a seed, or those of a round of steps taken in turn."""

    @property
    def num_runs(self) -> int:
        """Runs in which it was measured, or rounds."""
        return len(self.values)

    @property
    def resolution_frac(self) -> float:
        """Below this a difference is none: 1% where measured, nothing where counted."""
        return 0.0 if self.axis in _COUNTED else _RESOLUTION_FRAC


def ratio_range(ours: Cost, theirs: Cost) -> tuple[float, float] | None:
    """Returns the least and the greatest ratio of two costs; None if they share no condition.

    Ratios are taken seed by seed, over the same batches, or round by round; of rounds, which one
    disturbance must not decide, the quartiles are returned.
    """
    if ours.paired_by != theirs.paired_by:
        return None
    shared = ours.values.keys() & theirs.values.keys()
    ratios = [ours.values[key] / theirs.values[key] for key in shared]
    if not ratios:
        return None
    if ours.paired_by == "round":
        low, high = np.quantile(ratios, (0.25, 0.75)).tolist()
        return low, high
    return min(ratios), max(ratios)


def costs_no_more(ours: Cost, theirs: Cost) -> bool:
    """Returns whether ours is established to be no higher: by all seeds, or most rounds."""
    found = ratio_range(ours, theirs)
    return found is not None and found[1] <= 1 + ours.resolution_frac


def costs_more(ours: Cost, theirs: Cost) -> bool:
    """Returns whether ours is established to be higher: by all seeds, or most rounds."""
    found = ratio_range(ours, theirs)
    return found is not None and found[0] > 1 + ours.resolution_frac


def arm_costs(study: StudyRecord, arm: str) -> dict[Axis, Cost]:
    """Returns the costs of an arm; an axis on which no run was measured is left out."""
    runs = study.runs_of(arm)
    found: dict[Axis, Cost] = {}
    for axis, read in _READERS.items():
        values = {seed: value for seed, run in runs.items() if (value := read(run)) is not None}
        if values:
            each = values.values()
            found[axis] = Cost(axis, statistics.median(each), min(each), max(each), values)
    if in_turn := step_in_turn(study, arm):
        found["step_time_s"] = in_turn
    return found


def step_in_turn(study: StudyRecord, arm: str) -> Cost | None:
    """Returns an arm's step time from the clock that all arms shared; None if it has none.

    Times of a round are of one batch and minutes apart at most, so they are divided by the
    reference's; what comes out is scaled back by the reference's median.
    """
    times = study.clock.step_time_s if study.clock else {}
    if arm not in times or study.reference not in times:
        return None
    reference = times[study.reference]
    ratios = [ours / theirs for ours, theirs in zip(times[arm], reference, strict=True)]
    scale = statistics.median(reference)
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return Cost(
        "step_time_s",
        scale * middle,
        scale * low,
        scale * high,
        dict(enumerate(times[arm])),
        paired_by="round",
    )


def amount_words(axis: Axis, value: float) -> str:
    """Returns a cost with its unit, e.g. ``4.73 GiB`` or ``4,884,480 trainable parameters``."""
    name, unit = AXES[axis]
    if not unit:
        return f"{value:,.0f} {name}"
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def _adapter_mib(run: RunRecord) -> float:
    """Returns the size of the adapter's file, or of its parameters where it was not kept."""
    file = run.path / ADAPTER / ADAPTER_WEIGHTS
    if file.is_file():
        return file.stat().st_size / _MIB
    return run.result.efficiency.trainable_params * _BYTES_PER_PARAM / _MIB


_READERS: dict[Axis, Callable[[RunRecord], float | None]] = {
    "trainable_params": lambda run: run.result.efficiency.trainable_params,
    "peak_memory_gib": lambda run: run.result.efficiency.peak_memory_gib.of_training,
    "step_time_s": lambda run: run.result.efficiency.step_time_s.median,
    "latency_ms_per_token": lambda run: run.result.efficiency.latency_ms_per_token.unmerged,
    "adapter_mib": _adapter_mib,
}


def costs_of(study: StudyRecord, axis: Axis) -> dict[str, Cost]:
    """Returns a cost of every arm that measured it, in the study's order."""
    found = {arm.name: arm_costs(study, arm.name).get(axis) for arm in study.arms}
    return {arm: cost for arm, cost in found.items() if cost}
