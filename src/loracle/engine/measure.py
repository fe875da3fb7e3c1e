"""Measures the costs of a run: parameters, step times, memory per phase, latency.

Clocks count optimizer steps only. Memory peaks are reset at the start of each phase. What was not
measured is None, never 0.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from loracle.engine.decode import greedy
from loracle.engine.device import release_free_memory, synchronize
from loracle.engine.evaluate import Progress
from loracle.model.base import FrozenBase
from loracle.model.layers.lora import RoutedLinear
from loracle.model.layers.routing import Route
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


@dataclass(frozen=True)
class Latency:
    """Median decoding times of one answer at a time."""

    first_token_ms: float
    """Time from the prompt to the first token."""
    ms_per_token: float
    """Time of each further token."""


def measure_latency(
    base: FrozenBase,
    prompt: Sequence[int],
    *,
    adapter: str,
    new_tokens: int,
    trials: int,
    progress: Progress = lambda _: None,
) -> dict[str, Latency | None]:
    """Returns the latency of ``base``, ``unmerged`` and ``merged`` on one prompt, batch of 1.

    After one warm-up the variants take turns, so that drift of the machine affects all alike.
    ``merged`` is None if the merged weights do not fit beside the frozen ones, or for a base in 4
    bits. EOS is suppressed, so each trial decodes exactly ``new_tokens``.
    """
    variants: dict[str, Callable[[], Any]] = {
        "base": lambda: base.generating(()),
        "unmerged": lambda: base.generating((Route(adapter),)),
    }
    merged = merged_weights(base, adapter=adapter)
    if merged is not None:
        variants["merged"] = lambda: _generating_merged(base, merged)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for trial in range(trials + 1):
        for name, lend in variants.items():
            with lend():
                pair = (_decode_s(base, prompt, 1), _decode_s(base, prompt, new_tokens))
            progress(1)
            if trial:
                times[name].append(pair)
    return {
        name: _latency(times[name], new_tokens) if name in times else None
        for name in ("base", "unmerged", "merged")
    }


def _latency(pairs: Sequence[tuple[float, float]], new_tokens: int) -> Latency:
    return Latency(
        first_token_ms=1e3 * statistics.median(first for first, _ in pairs),
        ms_per_token=1e3
        * statistics.median((total - first) / (new_tokens - 1) for first, total in pairs),
    )


def _decode_s(base: FrozenBase, prompt: Sequence[int], new_tokens: int) -> float:
    ids = torch.as_tensor(prompt, dtype=torch.int64, device=base.device)[None]
    config = greedy(base, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    synchronize(base.device)
    started_at = time.perf_counter()
    base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    synchronize(base.device)
    return time.perf_counter() - started_at


def merged_weights(base: FrozenBase, *, adapter: str) -> dict[str, Tensor] | None:
    """Returns W + scale * B A of every adapted layer, in the base's dtype; None if out of memory.

    Stored beside the frozen weights, because subtracting the update again would not restore their
    bits. None for a base in 4 bits: packing the merged weights again would give another model.
    """
    if base.quantization is not None:
        return None
    merged: dict[str, Tensor] = {}
    try:
        for name, layer in base.model.named_modules():
            if isinstance(layer, RoutedLinear) and adapter in layer.lora_A:
                weight = layer.get_base_layer().weight.detach()
                merged[name] = (weight.float() + layer.get_delta_weight(adapter)).to(weight.dtype)
    except torch.OutOfMemoryError:
        return None
    return merged


@contextmanager
def _generating_merged(base: FrozenBase, merged: dict[str, Tensor]) -> Iterator[None]:
    """Lends the model with the merged weights in place of the frozen ones."""
    frozen: dict[str, nn.Parameter] = {}
    for name, weight in merged.items():
        layer = base.model.get_submodule(name).get_base_layer()
        # A new parameter rather than new data in it, because a tied embedding shares it.
        frozen[name], layer.weight = layer.weight, nn.Parameter(weight, requires_grad=False)
    try:
        with base.generating(()):
            yield
    finally:
        for name, parameter in frozen.items():
            base.model.get_submodule(name).get_base_layer().weight = parameter
