"""Predicted beside measured memory and time of a study's arms.

The prediction is for a measured batch: of each arm's first run, the longest of the steps in which
memory was counted. Otherwise it is that of `loracle plan`. The comparison is stored in the study's
folder, so that a report can be written where the model is not available.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.forecast.calibration import read_calibration
from loracle.forecast.cases import in_processes
from loracle.forecast.devices import Device
from loracle.forecast.meta_base import model_without_weights
from loracle.forecast.predict import GRANULE
from loracle.forecast.trace import Trace, synthetic_examples, trace_step
from loracle.model.faults import model_faults
from loracle.placement import ModulePlan
from loracle.records.files import read_json
from loracle.records.names import ENVIRONMENT, MODULES
from loracle.records.predictions import ArmAccuracy, keep_accuracy, kept_accuracy
from loracle.records.run_state import recorded_config
from loracle.records.study_folder import RunRecord, StudyRecord
from loracle.text import GIB


@dataclass(frozen=True)
class _Traced:
    """The trace of an arm's step."""

    trace: Trace
    tokens: int
    """Tokens of the traced step."""


def accuracy_of(study: StudyRecord) -> list[ArmAccuracy]:
    """Returns predictions and measurements of every arm that has a run.

    Raises:
        UsageError: If the model's architecture is not available here.
    """
    from loracle.sources import model_architecture

    runs = [next(iter(study.runs_of(arm.name).values()), None) for arm in study.arms]
    measured = [run for run in runs if run is not None and run.steps]
    if not measured:
        return []
    architecture = model_architecture(recorded_config(measured[0].path).model)
    jobs = [_Job.of(run, architecture) for run in measured]
    return [
        _accuracy(job.run, traced)
        for job, traced in zip(jobs, in_processes(_trace, jobs), strict=True)
    ]


@dataclass(frozen=True)
class _Job:
    run: RunRecord
    config: Config
    plan: ModulePlan
    architecture: Mapping[str, Any]

    @classmethod
    def of(cls, run: RunRecord, architecture: Mapping[str, Any]) -> _Job:
        plan = ModulePlan.from_json(read_json(run.path / MODULES))
        return cls(run, recorded_config(run.path), plan, architecture)


def _trace(job: _Job) -> _Traced:
    import torch

    environment = read_json(job.run.path / ENVIRONMENT)
    dtype: torch.dtype = getattr(torch, environment["device"]["dtype"])
    on_gpu = job.run.result.efficiency.peak_memory_gib.kind_of_training == "cuda_allocated"
    device = Device("", 0, has_bf16=dtype == torch.bfloat16, is_gpu=on_gpu)
    row = _measured_step(job)
    base_and_adapter = model_without_weights(
        job.architecture,
        plan=job.plan,
        device=device,
        dtype=dtype,
        dropout=job.config.lora.dropout,
        quantization=job.config.quantization,
    )
    # A run that is done is not lost to what cannot be traced: the table is left out.
    with (
        model_faults(f"{job.config.model}: cannot be planned, though it ran"),
        base_and_adapter as (base, adapter),
    ):
        traced = trace_step(
            base,
            adapter=adapter,
            config=job.config,
            examples=synthetic_examples(_lengths(row, count=job.config.train.batch_size)),
            granule=GRANULE if on_gpu else 1,
        )
    return _Traced(traced, row["num_tokens"])


def _measured_step(job: _Job) -> Mapping[str, Any]:
    """Returns the longest step whose memory was counted: on a CPU of the first few, else of all."""
    steps = job.run.steps
    if job.run.result.efficiency.peak_memory_gib.kind_of_training == "tensors":
        steps = steps[: max(2, job.config.measure.skip_steps)]
    longest: Mapping[str, Any] = max(steps, key=lambda row: row["num_tokens"])
    return longest


def _lengths(row: Mapping[str, Any], *, count: int) -> list[tuple[int, int]]:
    """Returns (prompt, response) lengths, nearly equal, with a step's tokens and targets."""
    tokens, targets = (_shares(row[key], count) for key in ("num_tokens", "num_targets"))
    return [(max(1, total - part), part) for total, part in zip(tokens, targets, strict=True)]


def _shares(total: int, count: int) -> list[int]:
    share, rest = divmod(total, count)
    return [share + (index < rest) for index in range(count)]


def _accuracy(run: RunRecord, traced: _Traced) -> ArmAccuracy:
    environment = read_json(run.path / ENVIRONMENT)
    memory = run.result.efficiency.peak_memory_gib
    recorded = environment["device"]
    device = Device(recorded["name"], 0, has_bf16=True)
    calibration = read_calibration(device, dtype=recorded["dtype"])
    clocked = [row["num_tokens"] for row in run.steps if row["clocked"]]
    predicted_s = None
    if calibration is not None and clocked and "trunk" not in environment.get("engine", {}):
        overlaps = memory.kind_of_training == "cuda_allocated"
        seconds = traced.trace.work.seconds(calibration.rates(overlaps=overlaps))
        predicted_s = seconds * statistics.median(clocked) / traced.tokens
    return ArmAccuracy(
        arm=run.arm,
        predicted_gib=traced.trace.peak / GIB,
        measured_gib=memory.of_training,
        memory_kind=memory.kind_of_training,
        predicted_step_s=predicted_s,
        measured_step_s=run.result.efficiency.step_time_s.median,
        speed_measured_at=(
            calibration.measured_at if calibration and predicted_s is not None else None
        ),
    )


def compare_with_measured(folder: Path, study: StudyRecord) -> None:
    """Stores predictions of a study's arms beside their measurements, unless all are stored."""
    stored = {row.arm for row in kept_accuracy(folder)}
    if {arm.name for arm in study.arms if study.runs_of(arm.name)} <= stored:
        return
    try:
        keep_accuracy(folder, accuracy_of(study))
    except UsageError:
        # Without the model's architecture the report leaves this table out.
        return
