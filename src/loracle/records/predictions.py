"""Predicted and measured memory and step times of a study's arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracle.records.files import from_json, json_bytes, read_json, to_json
from loracle.records.manifest import write_records
from loracle.records.names import PREDICTED, STUDY_RECORDS

_SCHEMA = 1


@dataclass(frozen=True)
class ArmAccuracy:
    """An arm's predictions and measurements."""

    arm: str
    predicted_gib: float
    """Peak of live tensors in training."""
    measured_gib: float | None
    """Measured peak, counted or read from the device; None: not measured."""
    memory_kind: str
    """A key of `loracle.records.result.MEMORY_KINDS`."""
    predicted_step_s: float | None
    """For a step with as many tokens as the clocked ones; None: the device was not calibrated."""
    measured_step_s: float | None
    """Median over the run; None: not measured."""
    speed_measured_at: str | None
    """Date of the device's calibration; None: no time was predicted."""

    @property
    def memory_error_frac(self) -> float | None:
        """(predicted - measured) / measured."""
        return _error(self.predicted_gib, self.measured_gib)

    @property
    def time_error_frac(self) -> float | None:
        """(predicted - measured) / measured."""
        return _error(self.predicted_step_s, self.measured_step_s)


def _error(predicted: float | None, measured: float | None) -> float | None:
    if predicted is None or measured is None:
        return None
    return (predicted - measured) / measured


def keep_accuracy(folder: Path, accuracies: Sequence[ArmAccuracy]) -> Path:
    """Writes predictions and measurements into a study's folder and returns the file."""
    path = folder / PREDICTED
    data = {"schema": _SCHEMA, "arms": [to_json(arm) for arm in accuracies]}
    write_records(folder, {PREDICTED: json_bytes(data, origin=PREDICTED)}, known=STUDY_RECORDS)
    return path


def kept_accuracy(folder: Path) -> list[ArmAccuracy]:
    """Returns the predictions in a study's folder; empty if there are none."""
    path = folder / PREDICTED
    if not path.is_file():
        return []
    return [from_json(ArmAccuracy, row, origin=f"{path}") for row in read_json(path)["arms"]]
