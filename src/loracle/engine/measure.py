"""Measures the costs of a run: parameters, step times, memory per phase.

Clocks count optimizer steps only. Memory peaks are reset at the start of each phase. What was not
measured is None, never 0.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from loracle.engine.device import release_free_memory
from loracle.text import GIB


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a run."""

    trainable: int
    """Parameters of the adapter; for full fine-tuning, of the model."""
    base: int
    """Parameters of the model, tied weights counted once."""

    @property
    def total(self) -> int:
        """Parameters of base and adapter; without an adapter, of the base."""
        return self.base + (self.trainable if self.trainable != self.base else 0)

    @property
    def trainable_frac(self) -> float:
        """Trainable over total, as PEFT prints it."""
        return self.trainable / self.total


@dataclass(frozen=True)
class StepClock:
    """Step times of a run, without its first steps."""

    median_s: float
    p25_s: float
    p75_s: float
    mean_s: float
    num_steps: int
    tokens_per_s: float
    """Tokens without padding over clocked time."""


def step_clock(rows: Sequence[Mapping[str, Any]]) -> StepClock | None:
    """Returns the clock over the clocked rows of ``steps.jsonl``; None for fewer than two."""
    clocked = [row for row in rows if row["clocked"]]
    if len(clocked) < 2:
        return None
    times = [row["step_time_s"] for row in clocked]
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive")
    tokens = sum(row["num_tokens"] for row in clocked)
    return StepClock(
        median_s=median,
        p25_s=p25,
        p75_s=p75,
        mean_s=statistics.fmean(times),
        num_steps=len(times),
        tokens_per_s=tokens / sum(times),
    )


@contextmanager
def imports_set_aside() -> Iterator[None]:
    """Leaves out of every collection of garbage in the block what was alive before it.

    A run collects at each change of phase, and would scan each time all objects that importing
    PyTorch, Transformers and PEFT made. A notebook of tiny runs: 42 to 29 s (2 CPU cores, LOG.md).
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass
class MemoryMeter:
    """Peak memory of each phase on the run's device.

    On a GPU: memory occupied by tensors and, separately, reserved by the allocator. On a CPU: the
    resident set of the process, an upper bound that includes Python, libraries and freed blocks
    that the allocator keeps (device.keep_large_blocks).
    """

    device: torch.device
    peaks_gib: dict[str, float | None] = field(default_factory=dict)
    reserved_gib: dict[str, float | None] = field(default_factory=dict)
    tensors_gib: dict[str, float] = field(default_factory=dict)
    """Counted peak of live tensors, on devices that do not count it themselves.

    Unlike the resident set it does not depend on what the process did before.
    """
    _latest: str | None = field(default=None, repr=False)
    """The phase entered last."""

    @property
    def kind(self) -> str:
        """Kind of memory that the peaks measure."""
        return "cuda_allocated" if self.device.type == "cuda" else "resident_set"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records the peak inside the block; a phase entered again keeps its highest.

        At a change of phase, memory left with the allocator is released first. Between the steps of
        one phase that would cost more time than it is worth.
        """
        if name != self._latest and self.device.type == "cpu":
            # Models no longer used are held by reference cycles.
            gc.collect()
            release_free_memory()
        self._latest = name
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        measurable = on_gpu or _reset_peak_resident_set()
        try:
            yield
        finally:
            if on_gpu:
                _keep_highest(self.peaks_gib, name, torch.cuda.max_memory_allocated(self.device))
                _keep_highest(self.reserved_gib, name, torch.cuda.max_memory_reserved(self.device))
            else:
                peak = _peak_resident_set_bytes() if measurable else None
                _keep_highest(self.peaks_gib, name, peak)

    def to_json(self) -> dict[str, Any]:
        """Returns the peaks, for a checkpoint."""
        return {
            "peaks_gib": self.peaks_gib,
            "reserved_gib": self.reserved_gib,
            "tensors_gib": self.tensors_gib,
        }

    def remember(self, before: Mapping[str, Mapping[str, float | None]]) -> None:
        """Restores the output of ``to_json``, keeping the highest peak of each phase."""
        for name, peaks in (("peaks_gib", self.peaks_gib), ("reserved_gib", self.reserved_gib)):
            for phase, peak in before[name].items():
                peaks[phase] = max(filter(None, (peaks.get(phase), peak)), default=None)
        self.tensors_gib |= {phase: peak for phase, peak in before["tensors_gib"].items() if peak}


def _keep_highest(peaks: dict[str, float | None], name: str, value: int | None) -> None:
    if value is not None:
        peaks[name] = max(value / GIB, peaks.get(name) or 0.0)
    else:
        peaks.setdefault(name, None)


def _reset_peak_resident_set() -> bool:
    """Resets the kernel's high-water mark of this process. Source: proc(5), clear_refs."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_resident_set_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return max(int(line.split()[1]) * 1024, psutil.Process().memory_info().rss)
