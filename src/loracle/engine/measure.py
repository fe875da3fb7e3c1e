"""What a run costs: parameters, step clocks, memory per phase, latency.

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
from loracle.engine.evaluate import Progress, routes_to
from loracle.model.base import FrozenBase
from loracle.model.layers.lora import RoutedLinear
from loracle.text import GIB


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a run."""

    trainable: int
    """Of the adapter; of full fine-tuning, of the model."""
    base: int
    """Of the model, tied weights once; full fine-tuning would train these."""

    @property
    def total(self) -> int:
        """Base and adapter; without an adapter, the base."""
        return self.base + (self.trainable if self.trainable != self.base else 0)

    @property
    def trainable_frac(self) -> float:
        """Trainable over total, as PEFT prints it."""
        return self.trainable / self.total


@dataclass(frozen=True)
class StepClock:
    """Step times of a run, first steps left out."""

    median_s: float
    p25_s: float
    p75_s: float
    mean_s: float
    num_steps: int
    tokens_per_s: float
    """Real tokens over clocked time."""


def step_clock(rows: Sequence[Mapping[str, Any]]) -> StepClock | None:
    """Returns the clock over the step rows marked ``clocked``; None if there are fewer than two.

    Args:
        rows: Rows of ``steps.jsonl`` with ``clocked``, ``step_time_s`` and ``num_tokens``.
    """
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


@dataclass
class MemoryMeter:
    """Peak memory of each phase on the device where the run computes.

    On a GPU: what tensors occupied, and apart from it what the allocator held. On a CPU: the
    resident set of the process, which includes Python, libraries and the freed blocks that the
    allocator keeps (device.keep_large_blocks), so it is an upper bound and labelled as what it is.
    """

    device: torch.device
    peaks_gib: dict[str, float | None] = field(default_factory=dict)
    reserved_gib: dict[str, float | None] = field(default_factory=dict)
    tensors_gib: dict[str, float] = field(default_factory=dict)
    """What live tensors took at their most, counted; only where the device does not count itself.

    Unlike the resident set it does not depend on what the process did before.
    """
    _latest: str | None = field(default=None, repr=False)
    """The phase entered last."""

    @property
    def kind(self) -> str:
        """What the peaks are peaks of."""
        return "cuda_allocated" if self.device.type == "cuda" else "resident_set"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records the peak inside the block; a phase entered again keeps its highest.

        Where another phase was before, what it left with the allocator is given back first. Between
        the steps of one phase that would cost more than the step gains from it.
        """
        if name != self._latest and self.device.type == "cpu":
            # Models that are done with hang in reference cycles.
            gc.collect()
            release_free_memory()
        self._latest = name
        known = self._reset()
        try:
            yield
        finally:
            self._keep(self.peaks_gib, name, self._peak_bytes() if known else None)
            if self.device.type == "cuda":
                self._keep(self.reserved_gib, name, torch.cuda.max_memory_reserved(self.device))

    def to_json(self) -> dict[str, Any]:
        """Returns the peaks, so that a run that goes on elsewhere keeps them."""
        return {
            "peaks_gib": self.peaks_gib,
            "reserved_gib": self.reserved_gib,
            "tensors_gib": self.tensors_gib,
        }

    def remember(self, before: Mapping[str, Mapping[str, float | None]]) -> None:
        """Takes in what ``to_json`` returned before; of each phase the highest counts."""
        for ours in (self.peaks_gib, self.reserved_gib):
            name = "peaks_gib" if ours is self.peaks_gib else "reserved_gib"
            for phase, peak in before[name].items():
                ours[phase] = max(filter(None, (ours.get(phase), peak)), default=None)
        self.tensors_gib |= {phase: peak for phase, peak in before["tensors_gib"].items() if peak}

    def _reset(self) -> bool:
        """Forgets the peak so far; False where the platform cannot."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        return _reset_peak_resident_set()

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _peak_resident_set_bytes()

    @staticmethod
    def _keep(peaks: dict[str, float | None], name: str, value: int | None) -> None:
        before = peaks.get(name)
        if value is not None:
            peaks[name] = max(value / GIB, before or 0.0)
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
    """Decoding one answer at a time: medians over the trials."""

    first_token_ms: float
    """Prompt in, one token out."""
    ms_per_token: float
    """Each further token."""


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

    One warm-up of each, then the variants in turn, so that drift of the machine hits all alike.
    ``merged`` is None if the merged weights do not fit beside the frozen ones, or of a base in 4
    bits.

    Args:
        base: The frozen model.
        prompt: Token ids.
        adapter: Adapter name.
        new_tokens: Tokens decoded per trial, whatever they are (EOS is held back).
        trials: Trials per variant.
        progress: Called after each trial of each variant.
    """
    variants: dict[str, Callable[[], Any]] = {
        "base": lambda: base.generating(()),
        "unmerged": lambda: base.generating(routes_to(adapter)),
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
        first_token_ms=1e3 * statistics.median(one for one, _ in pairs),
        ms_per_token=1e3
        * statistics.median((all_ - one) / (new_tokens - 1) for one, all_ in pairs),
    )


def _decode_s(base: FrozenBase, prompt: Sequence[int], new_tokens: int) -> float:
    ids = torch.as_tensor(prompt, dtype=torch.int64, device=base.device)[None]
    config = greedy(base, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    synchronize(base.device)
    began = time.perf_counter()
    base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    synchronize(base.device)
    return time.perf_counter() - began


def merged_weights(base: FrozenBase, *, adapter: str) -> dict[str, Tensor] | None:
    """Returns W + scale * B A of every adapted layer, in the base's dtype; None if out of memory.

    Kept beside the frozen weights rather than added to them: subtracting again would not restore
    their bits. None too of a base in 4 bits: merged weights would have to be packed again, which
    makes another model of them.
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
        # Another parameter, not other data in it: a tied embedding shares the parameter.
        frozen[name], layer.weight = layer.weight, nn.Parameter(weight, requires_grad=False)
    try:
        with base.generating(()):
            yield
    finally:
        for name, parameter in frozen.items():
            base.model.get_submodule(name).get_base_layer().weight = parameter
