"""What an arm costs with nothing beside it, measured in a few steps that leave no trace.

In a bundle a step's time and memory belong to all of its runs. So each arm of a bundle is clocked
alone, on a scratch adapter with its plan, before the bundle begins.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from loracle.config.run import Config, num_probed_steps
from loracle.data import Example
from loracle.data.packing import batches_by_tokens
from loracle.engine.evaluate import answer_prompts, score_examples
from loracle.engine.measure import Latency, MemoryMeter, measure_latency
from loracle.engine.out_of_memory import memory_faults
from loracle.engine.step_memory import StepTensors
from loracle.engine.throughput import token_rates
from loracle.engine.train import train_bundle
from loracle.engine.train_state import TrainingRun
from loracle.model.adapters import save_adapter
from loracle.placement import ModulePlan
from loracle.runner.bundle_size import BundleChoice, StepMemory, choose_bundle_size
from loracle.runner.prepare import Member, fill_for
from loracle.runner.shared_base import Workbench
from loracle.text import GIB

_SCRATCH = "default"


# assumed: small enough that the scratch adapter stays where it began, whatever the run's rate
_RATE = 1e-9


@dataclass(frozen=True)
class Isolated:
    """What an arm costs alone."""

    step_rows: Sequence[Mapping[str, Any]]
    """Step records, each with ``clocked``."""
    memory: MemoryMeter
    """Peaks of training and of one validation pass."""
    latency: Mapping[str, Latency | None]


def measure_alone(
    bench: Workbench, *, config: Config, plan: ModulePlan, with_trunk: bool
) -> Isolated:
    """Returns what a run of this arm costs alone. The base must be, and is left, without adapters.

    Args:
        bench: The base and its data.
        config: The run's configuration; of ``train``, the rate and the number of steps are ours.
        plan: Its modules.
        with_trunk: Steps begin from kept hidden states.
    """
    memory = bench.meter()
    run = _scratch_run(bench, config=config, plan=plan)
    title = f"measure {plan.placement} alone"
    try:
        with bench.screen.phase(title, total=run.train.max_steps) as advance:
            rows = []
            bundle = train_bundle(
                bench.base,
                [run],
                micro_batch_tokens=config.train.micro_batch_tokens,
                trunk=bench.trunk if with_trunk else None,
                checkpointing=config.train.gradient_checkpointing,
            )
            counted = StepTensors(
                bench.base, run, memory=memory, num_steps=config.measure.skip_steps
            )
            while run.is_active:
                with memory.phase("train"), counted.step():
                    (record,) = next(bundle)
                assert record is not None
                rows.append({**asdict(record), "clocked": run.step > config.measure.skip_steps})
                bench.stopping(advance)(1)
        with memory.phase("evaluate"):
            score_one_batch(bench, adapter=_SCRATCH)
        return Isolated(rows, memory, latency_of(bench, adapter=_SCRATCH))
    finally:
        bench.clear()


def _scratch_run(bench: Workbench, *, config: Config, plan: ModulePlan) -> TrainingRun:
    changes = {"max_steps": num_probed_steps(config), "learning_rate": _RATE}
    train = config.train.model_copy(update=changes)
    return bench.new_run(config, plan=plan, name=_SCRATCH, train=train)


def score_one_batch(bench: Workbench, *, adapter: str) -> None:
    """Scores the longest batch of a validation, which is where it needs most memory."""
    by_length: list[Example] = sorted(bench.scored, key=lambda example: example.num_tokens)
    budget = bench.config.eval.batch_tokens
    *_, last = batches_by_tokens([each.num_tokens for each in by_length], budget=budget)
    longest = [by_length[place] for place in last]
    score_examples(bench.base, longest, adapter=adapter, batch_tokens=budget)


def latency_of(bench: Workbench, *, adapter: str) -> dict[str, Latency | None]:
    """Returns the latency of the three variants on the validation prompt of median length."""
    measure = bench.config.measure
    if not measure.latency_trials:
        return dict.fromkeys(("base", "unmerged", "merged"))
    by_length = sorted(bench.data.validation, key=lambda example: example.num_prompt)
    middle = by_length[len(by_length) // 2]
    with bench.screen.phase("latency", total=3 * (measure.latency_trials + 1)) as advance:
        return measure_latency(
            bench.base,
            middle.input_ids[: middle.num_prompt],
            adapter=adapter,
            new_tokens=measure.latency_new_tokens,
            trials=measure.latency_trials,
            progress=bench.stopping(advance),
        )


_SMOKE_STEPS = 2


_SMOKE_NEW_TOKENS = 2


def smoke(bench: Workbench, *, config: Config, plan: ModulePlan) -> None:
    """Takes two steps, scores the longest batch, answers a batch of prompts, and saves.

    The base must be, and is left, without adapters.

    Args:
        bench: The base and its data.
        config: A run's configuration; of ``train``, the rate and the number of steps are ours.
        plan: Its modules.

    Raises:
        OutOfMemory: If something does not fit.
        NonFiniteError: If a loss or gradient is NaN or infinite.
    """
    train = config.train.model_copy(update={"max_steps": _SMOKE_STEPS, "learning_rate": _RATE})
    try:
        run = bench.new_run(config, plan=plan, name=_SCRATCH, train=train)
        with (
            bench.screen.phase("smoke test", total=_SMOKE_STEPS + 3) as advance,
            memory_faults("smoke test", remedy="`loracle plan` says what fits"),
        ):
            done = bench.stopping(advance)
            for _ in train_bundle(
                bench.base,
                [run],
                micro_batch_tokens=config.train.micro_batch_tokens,
                checkpointing=config.train.gradient_checkpointing,
            ):
                done(1)
            score_one_batch(bench, adapter=_SCRATCH)
            done(1)
            if prompts := bench.prompts[: config.eval.generate_batch_size]:
                answer_prompts(
                    bench.base, prompts, adapter=_SCRATCH, max_new_tokens=_SMOKE_NEW_TOKENS
                )
            done(1)
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(bench.base, name=_SCRATCH, folder=Path(folder))
            done(1)
    finally:
        bench.clear()


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
