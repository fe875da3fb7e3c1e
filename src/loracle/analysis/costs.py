"""Costs of an arm over its runs: parameters, memory, time, latency and size on the disk."""

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
"""Name and unit of each axis."""

# assumed: repeated readings of a clock or a resident set agree no better than this.
_RESOLUTION_FRAC = 0.01
_COUNTED: tuple[Axis, ...] = ("trainable_params", "adapter_mib")
_BYTES_PER_PARAM = 4  # adapters are trained and saved in fp32
_MIB = 1024**2


@dataclass(frozen=True)
class Cost:
    """Cost of an arm on one axis, over its completed runs."""

    axis: Axis
    median: float
    low: float
    """Cheapest run; lower quartile of steps taken in turn."""
    high: float
    """Most expensive run; upper quartile of steps taken in turn."""
    values: Mapping[int, float]
    """Measurements by seed or by round."""
    paired_by: Literal["seed", "round"] = "seed"
    """Arms share the batches of a seed, or those of a round of steps taken in turn."""

    @property
    def resolution_frac(self) -> float:
        """Relative differences below this do not count: 1% if measured, 0 if counted."""
        return 0.0 if self.axis in _COUNTED else _RESOLUTION_FRAC


def ratio_range(a: Cost, b: Cost) -> tuple[float, float] | None:
    """Returns the lowest and highest ratio a / b; None without a common seed or round.

    Ratios are taken seed by seed, over the same batches, or round by round. For rounds these are
    the quartiles, which a single disturbance does not move.
    """
    if a.paired_by != b.paired_by:
        return None
    ratios = [a.values[key] / b.values[key] for key in a.values.keys() & b.values.keys()]
    if not ratios:
        return None
    if a.paired_by == "round":
        low, high = np.quantile(ratios, (0.25, 0.75)).tolist()
        return low, high
    return min(ratios), max(ratios)


def costs_no_more(a: Cost, b: Cost) -> bool:
    """Returns whether ``a`` is no higher than ``b`` in all seeds, or in most rounds."""
    ratios = ratio_range(a, b)
    return ratios is not None and ratios[1] <= 1 + a.resolution_frac


def costs_more(a: Cost, b: Cost) -> bool:
    """Returns whether ``a`` is higher than ``b`` in all seeds, or in most rounds."""
    ratios = ratio_range(a, b)
    return ratios is not None and ratios[0] > 1 + a.resolution_frac


def arm_costs(study: StudyRecord, arm: str) -> dict[Axis, Cost]:
    """Returns the measured costs of an arm by axis."""
    costs = {axis: _cost(study, arm, axis) for axis in _READERS}
    return {axis: cost for axis, cost in costs.items() if cost}


def _cost(study: StudyRecord, arm: str, axis: Axis) -> Cost | None:
    """Returns the cost of an arm on one axis; None: not measured."""
    in_turn = step_in_turn(study, arm) if axis == "step_time_s" else None
    if in_turn is not None:
        return in_turn
    runs, read = study.runs_of(arm), _READERS[axis]
    values = {seed: value for seed, run in runs.items() if (value := read(run)) is not None}
    if not values:
        return None
    measured = values.values()
    return Cost(axis, statistics.median(measured), min(measured), max(measured), values)


def step_in_turn(study: StudyRecord, arm: str) -> Cost | None:
    """Returns an arm's step time from the study's clock; None if it was not clocked there.

    Steps of a round take one batch within minutes, so each time is divided by the reference's; the
    ratios are scaled back by the reference's median.
    """
    times = study.clock.step_time_s if study.clock else {}
    if arm not in times or study.reference not in times:
        return None
    reference = times[study.reference]
    ratios = [a / b for a, b in zip(times[arm], reference, strict=True)]
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
    """Returns the size of the adapter's file, or of its parameters if the file is missing."""
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
    """Returns the cost of every arm that measured it, in the study's order."""
    costs = {arm.name: _cost(study, arm.name, axis) for arm in study.arms}
    return {arm: cost for arm, cost in costs.items() if cost}
