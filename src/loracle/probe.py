"""What is measured before a bundle begins: each arm alone, and how many runs the device takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import psutil
import torch

from loracle.bundle import BundleChoice, StepMemory, choose_bundle_size, token_rates
from loracle.isolated import Isolated, measure_alone
from loracle.members import Member, fill_for
from loracle.words import GIB
from loracle.workbench import Workbench


class Prober:
    """Measures on a base without adapters; an arm that another seed has is measured once."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._measured: dict[object, Isolated] = {}

    def measure(self, member: Member) -> Isolated:
        """Returns what the arm costs alone."""
        train = member.config.train
        key = (
            member.plan,
            member.trunk_layer,
            member.config.lora.dropout,
            train.batch_size,
            train.micro_batch_tokens,
            train.gradient_checkpointing,
        )
        if key not in self._measured:
            fill_for(self._bench, [member])
            self._measured[key] = measure_alone(
                self._bench,
                config=member.config,
                plan=member.plan,
                with_trunk=member.trunk_layer > 0,
            )
        return self._measured[key]

    def choose_size(self, members: Sequence[Member], *, asked: int | None) -> BundleChoice:
        """Returns how many of these runs train together."""
        bench, first = self._bench, members[0]
        mean_tokens = statistics.fmean(example.num_tokens for example in bench.data.train)
        return choose_bundle_size(
            num_runs=len(members),
            asked=asked,
            device_type=bench.base.device.type,
            tokens_per_step=mean_tokens * first.config.train.batch_size,
            rates=lambda: token_rates(self._largest_weight(first)),
            memory=lambda: self._step_memory(first),
        )

    def _largest_weight(self, member: Member) -> torch.Tensor:
        """Returns a weight of the shape of the largest layer that the run adapts."""
        largest = max(member.plan.modules, key=lambda one: one.in_features * one.out_features)
        base = self._bench.base
        shape = largest.out_features, largest.in_features
        return torch.ones(shape, dtype=base.dtype, device=base.device)

    def _step_memory(self, member: Member) -> StepMemory | None:
        base_gib, free_gib = device_memory_gib(self._bench.base.device)
        step_gib = self.measure(member).memory.peaks_gib["train"]
        if step_gib is None:
            return None
        return StepMemory(base_gib=base_gib, step_gib=step_gib, free_gib=free_gib)


def device_memory_gib(device: torch.device) -> tuple[float, float]:
    """Returns what this process holds of the device's memory, and what it could have besides.

    On a GPU what tensors occupy, and what is free or only held by the allocator; on a CPU the
    resident set of the process, and what the machine has available.
    """
    if device.type != "cuda":
        resident = psutil.Process().memory_info().rss
        return resident / GIB, psutil.virtual_memory().available / GIB
    free, _ = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    held = torch.cuda.memory_reserved(device) - used
    return used / GIB, (free + held) / GIB
