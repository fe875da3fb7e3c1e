"""Trials of an arm on a scratch adapter, which leave no trace: what it costs, whether it works.

In a bundle a step's time and memory belong to all of its runs. So each arm of a bundle is clocked
alone, with its plan, before the bundle begins.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from loracle.config.run import Config, num_probed_steps
from loracle.data import Example
from loracle.data.packing import batches_by_tokens
from loracle.engine.answers import answer_prompts
from loracle.engine.evaluate import score_examples
from loracle.engine.latency import Latency, measure_latency
from loracle.engine.measure import MemoryMeter
from loracle.engine.out_of_memory import Halved, free_memory, memory_faults, say_nothing
from loracle.engine.step_memory import StepTensors
from loracle.engine.throughput import token_rates
from loracle.engine.train import StepRecord, train_bundle
from loracle.engine.train_state import TrainState
from loracle.model.adapters import save_adapter
from loracle.model.faults import is_out_of_memory
from loracle.placement import ModulePlan
from loracle.runner.bundle_size import BundleChoice, StepMemory, choose_bundle_size
from loracle.runner.prepare import PreparedRun, fill_trunk
from loracle.runner.shared_base import SharedBase
from loracle.text import GIB

_SCRATCH = "default"
# assumed: small enough that the scratch adapter stays where it began, whatever the run's rate
_RATE = 1e-9
_SMOKE_STEPS, _SMOKE_NEW_TOKENS = 2, 2


def scratch_run(
    shared: SharedBase,
    *,
    config: Config,
    plan: ModulePlan,
    num_steps: int,
    name: str = _SCRATCH,
    with_trunk: bool = False,
    halved: Halved = say_nothing,
) -> tuple[TrainState, Iterator[StepRecord]]:
    """Returns a run whose adapter nobody keeps, and its steps; ``shared.clear`` takes it off.

    It replaces the configuration's learning rate and number of steps. ``with_trunk`` begins steps
    at kept hidden states; ``halved`` is called when passes are halved.
    """
    changes = {"max_steps": num_steps, "learning_rate": _RATE}
    train = config.train.model_copy(update=changes)
    state = shared.new_run(config, plan=plan, name=name, train=train)
    steps = train_bundle(
        shared.base,
        [state],
        micro_batch_tokens=train.micro_batch_tokens,
        trunk=shared.trunk.store if shared.trunk and with_trunk else None,
        checkpointing=train.gradient_checkpointing,
        halved=halved,
    )
    return state, (record for (record,) in steps if record is not None)


@dataclass(frozen=True)
class ProbeResult:
    """Cost of an arm with nothing beside it."""

    step_rows: Sequence[Mapping[str, Any]]
    """Step records, each with ``clocked``."""
    memory: MemoryMeter
    """Peaks of training and of one validation pass."""
    latency: Mapping[str, Latency | None]


def measure_alone(
    shared: SharedBase, *, config: Config, plan: ModulePlan, with_trunk: bool
) -> ProbeResult:
    """Returns the cost of an arm alone, on a base that is, and is left, without adapters."""
    memory = shared.meter()
    num_steps, skipped = num_probed_steps(config), config.measure.skip_steps
    try:
        state, steps = scratch_run(
            shared, config=config, plan=plan, num_steps=num_steps, with_trunk=with_trunk
        )
        title = f"measure {plan.placement} alone"
        with shared.progress.phase(title, total=num_steps) as advance:
            rows = []
            counted = StepTensors(shared.base, state, memory=memory, num_steps=skipped)
            while state.is_active:
                with memory.phase("train"), counted.step():
                    record = next(steps)
                rows.append({**asdict(record), "clocked": state.step > skipped})
                shared.stopping(advance)(1)
        with memory.phase("evaluate"):
            score_one_batch(shared, adapter=_SCRATCH)
        return ProbeResult(rows, memory, latency_of(shared, adapter=_SCRATCH))
    finally:
        shared.clear()


def score_one_batch(shared: SharedBase, *, adapter: str) -> None:
    """Scores the longest batch of a validation, which is where it needs most memory."""
    by_length: list[Example] = sorted(shared.scored, key=lambda example: example.num_tokens)
    budget = shared.config.eval.batch_tokens
    *_, last = batches_by_tokens([example.num_tokens for example in by_length], budget=budget)
    longest = [by_length[index] for index in last]
    score_examples(shared.base, longest, adapter=adapter, batch_tokens=budget)


def latency_of(shared: SharedBase, *, adapter: str) -> dict[str, Latency | None]:
    """Returns the latency of the three variants on the validation prompt of median length.

    None is a variant that was not measured, by request or for lack of memory, which is said.
    """
    measure = shared.config.measure
    unmeasured: dict[str, Latency | None] = dict.fromkeys(("base", "unmerged", "merged"))
    if not measure.latency_trials:
        return unmeasured
    try:
        found = _measured_latency(shared, adapter=adapter)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = unmeasured
    if found["unmerged"] is None:
        free_memory()
        shared.progress.notice(
            "latency: out of memory, not measured; lower measure.latency_new_tokens, or free "
            "memory that other programs hold"
        )
    elif found["merged"] is None and shared.base.quantization is None:
        shared.progress.notice(
            "latency: not measured merged; there is no room on the host for the frozen weights"
        )
    return found


def _measured_latency(shared: SharedBase, *, adapter: str) -> dict[str, Latency | None]:
    measure = shared.config.measure
    by_length = sorted(shared.data.validation, key=lambda example: example.num_prompt)
    median = by_length[len(by_length) // 2]
    with shared.progress.phase("latency", total=3 * (measure.latency_trials + 1)) as advance:
        return measure_latency(
            shared.base,
            median.input_ids[: median.num_prompt],
            adapter=adapter,
            new_tokens=measure.latency_new_tokens,
            trials=measure.latency_trials,
            progress=shared.stopping(advance),
        )


def smoke_test(shared: SharedBase, *, config: Config, plan: ModulePlan) -> None:
    """Takes two steps, scores the longest batch, answers a batch of prompts, and saves.

    The base must be, and is left, without adapters.

    Raises:
        OutOfMemory: If something does not fit.
        NonFiniteError: If a loss or gradient is NaN or infinite.
    """
    try:
        _, steps = scratch_run(shared, config=config, plan=plan, num_steps=_SMOKE_STEPS)
        with (
            shared.progress.phase("smoke test", total=_SMOKE_STEPS + 3) as advance,
            memory_faults("smoke test", remedy="`loracle plan` says what fits"),
        ):
            done = shared.stopping(advance)
            for _ in steps:
                done(1)
            score_one_batch(shared, adapter=_SCRATCH)
            done(1)
            if prompts := shared.prompts[: config.eval.generate_batch_size]:
                answer_prompts(
                    shared.base, prompts, adapter=_SCRATCH, max_new_tokens=_SMOKE_NEW_TOKENS
                )
            done(1)
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(shared.base, name=_SCRATCH, folder=Path(folder))
            done(1)
    finally:
        shared.clear()


class Prober:
    """Measures arms on a base without adapters, each once for all its seeds."""

    def __init__(self, shared: SharedBase) -> None:
        self._shared = shared
        self._measured: dict[object, ProbeResult] = {}

    def measure(self, run: PreparedRun) -> ProbeResult:
        """Returns the cost of the run's arm alone."""
        train = run.config.train
        key = (
            run.plan,
            run.trunk_layer,
            run.config.lora.dropout,
            train.batch_size,
            train.micro_batch_tokens,
            train.gradient_checkpointing,
        )
        if key not in self._measured:
            fill_trunk(self._shared, [run])
            self._measured[key] = measure_alone(
                self._shared, config=run.config, plan=run.plan, with_trunk=run.trunk_layer > 0
            )
        return self._measured[key]

    def choose_size(self, runs: Sequence[PreparedRun], *, requested: int | None) -> BundleChoice:
        """Returns how many of these runs train together."""
        shared, first = self._shared, runs[0]
        mean_tokens = statistics.fmean(example.num_tokens for example in shared.data.train)
        return choose_bundle_size(
            num_runs=len(runs),
            requested=requested,
            device_type=shared.base.device.type,
            tokens_per_step=mean_tokens * first.config.train.batch_size,
            rates=lambda: token_rates(self._largest_weight(first)),
            memory=lambda: self._step_memory(first),
        )

    def _largest_weight(self, run: PreparedRun) -> torch.Tensor:
        """Returns a weight of the shape of the largest layer that the run adapts."""
        largest = max(run.plan.modules, key=lambda module: module.in_features * module.out_features)
        base = self._shared.base
        shape = largest.out_features, largest.in_features
        return torch.ones(shape, dtype=base.dtype, device=base.device)

    def _step_memory(self, run: PreparedRun) -> StepMemory | None:
        base_gib, free_gib = device_memory_gib(self._shared.base.device)
        step_gib = self.measure(run).memory.peaks_gib["train"]
        if step_gib is None:
            return None
        return StepMemory(base_gib=base_gib, step_gib=step_gib, free_gib=free_gib)


def device_memory_gib(device: torch.device) -> tuple[float, float]:
    """Returns the memory that this process holds on the device, and what is free beside it.

    On a GPU the tensors, and what is free or only held by the allocator; on a CPU the resident set
    of the process, and what the machine has available.
    """
    if device.type != "cuda":
        resident = psutil.Process().memory_info().rss
        return resident / GIB, psutil.virtual_memory().available / GIB
    free, _ = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    held = torch.cuda.memory_reserved(device) - used
    return used / GIB, (free + held) / GIB
