"""Loss curves: training and validation losses of every arm, over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.records.study_folder import RunRecord, StudyRecord

Losses = NDArray[np.float64]

# assumed: a line of 600 pixels cannot show more points
_MAX_POINTS = 120
# assumed: a twelfth of a run is short beside it and long beside the noise of one batch
_WINDOWS_PER_RUN = 12


@dataclass(frozen=True)
class Curves:
    """Rows of the loss panels."""

    smooth: list[dict[str, Any]]
    """arm, step, loss, low, high: running mean over steps, mean and range over seeds."""
    raw: list[dict[str, Any]]
    """arm, step, loss: mean over seeds."""
    gaps: list[dict[str, Any]]
    """Like ``smooth``, for the other arms' loss minus the reference's on the same batch."""
    window_steps: int
    """Width of the running mean."""
    stride_steps: int
    """Steps from one drawn point to the next."""


def loss_curves(study: StudyRecord) -> Curves | None:
    """Returns the training losses of every arm; None if no run recorded a step."""
    losses = {arm.name: _by_seed(study.runs_of(arm.name)) for arm in study.arms}
    losses = {arm: seeds for arm, seeds in losses.items() if seeds}
    if not losses:
        return None
    num_steps = max(len(loss) for seeds in losses.values() for loss in seeds.values())
    half = max(1, num_steps // _WINDOWS_PER_RUN // 2)
    stride = -(-num_steps // _MAX_POINTS)
    reference = losses.get(study.reference, {})
    smooth, raw, gaps = [], [], []
    for arm, seeds in losses.items():
        stack = _stacked(list(seeds.values()))
        smooth += _rows(arm, _running_mean(stack, half=half), stride=stride)
        raw += _mean_rows(arm, stack, stride=stride)
        shared = [seed for seed in seeds if seed in reference]
        if arm != study.reference and shared:
            pairs = [_stacked([seeds[seed], reference[seed]]) for seed in shared]
            gap = _stacked([arm_loss - reference_loss for arm_loss, reference_loss in pairs])
            gaps += _rows(arm, _running_mean(gap, half=half), stride=stride)
    return Curves(smooth, raw, gaps, window_steps=2 * half + 1, stride_steps=stride)


def validation_curves(study: StudyRecord) -> list[dict[str, Any]]:
    """Returns rows like ``Curves.smooth`` of every validation of a tuned model."""
    rows = []
    for arm in study.arms:
        at: dict[int, list[float]] = {}
        for run in study.runs_of(arm.name).values():
            for row in run.evals:
                if row["model"] == "tuned":
                    at.setdefault(row["step"], []).append(row["loss_nats_per_token"])
        rows += [_row(arm.name, step, losses) for step, losses in sorted(at.items())]
    return rows


def _by_seed(runs: Mapping[int, RunRecord]) -> dict[int, Losses]:
    losses = {
        seed: np.array([row["loss_nats_per_token"] for row in run.steps], dtype=float)
        for seed, run in runs.items()
    }
    return {seed: loss for seed, loss in losses.items() if len(loss)}


def _stacked(losses: Sequence[Losses]) -> Losses:
    """Returns seeds x steps, cut to the shortest."""
    shortest = min(len(loss) for loss in losses)
    return np.stack([loss[:shortest] for loss in losses])


def _running_mean(losses: Losses, *, half: int) -> Losses:
    """Returns the mean over each step and ``half`` steps on either side: seeds x steps."""
    sums = np.concatenate([np.zeros((len(losses), 1)), np.cumsum(losses, axis=1)], axis=1)
    steps = np.arange(losses.shape[1])
    first, last = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(steps))
    mean: Losses = (sums[:, last] - sums[:, first]) / (last - first)
    return mean


def _rows(arm: str, losses: Losses, *, stride: int) -> list[dict[str, Any]]:
    num_steps = losses.shape[1]
    drawn = sorted({*range(0, num_steps, stride), num_steps - 1})
    return [_row(arm, index + 1, losses[:, index].tolist()) for index in drawn]


def _mean_rows(arm: str, losses: Losses, *, stride: int) -> list[dict[str, Any]]:
    """Returns the mean over seeds and over each ``stride`` steps, at the middle of them."""
    mean = losses.mean(axis=0)
    parts = [mean[start : start + stride] for start in range(0, len(mean), stride)]
    return [
        {"arm": arm, "step": n * stride + (len(part) + 1) / 2, "loss": float(part.mean())}
        for n, part in enumerate(parts)
    ]


def _row(arm: str, step: int, losses: Sequence[float]) -> dict[str, Any]:
    return {
        "arm": arm,
        "step": step,
        "loss": statistics.fmean(losses),
        "low": min(losses),
        "high": max(losses),
        "seeds": len(losses),
    }
