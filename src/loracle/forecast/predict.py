"""What a run will take on a device: memory by part, and time, traced from the code that will run.

A GPU differs from the CPU on which the trace is taken, in three ways that are put right, each by
name: it attends with another kernel (`loracle.forecast.meta_base`), its allocator hands out whole
granules (``GRANULE``), and it keeps memory for itself (``runtime_gib``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from loracle.config.run import Config
from loracle.data import Example
from loracle.engine.device import dtype_name
from loracle.engine.out_of_memory import largest_pass
from loracle.engine.throughput import USABLE_FRAC
from loracle.forecast.devices import Device
from loracle.forecast.lengths import Lengths, full_pass, usual_batch
from loracle.forecast.meta_base import Kind, fill, pretend_adapter, pretend_base, pretending
from loracle.forecast.op_costs import Rates
from loracle.forecast.trace import (
    Trace,
    made_up_examples,
    trace_answers,
    trace_scoring,
    trace_step,
)
from loracle.model.live_bytes import Part
from loracle.placement import ModulePlan
from loracle.text import GIB

Phase = Literal["train", "evaluate", "generate"]

# source: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize
GRANULE = 512
# assumed: context and kernels of CUDA 12 and 13 on one device, as nvidia-smi shows them when idle
_CONTEXT_GIB = 0.45
# source: PyTorch's notes on CUDA, CUBLAS_WORKSPACE_CONFIG: 8 MiB, from Hopper on 32 MiB
_WORKSPACE_GIB = 32 / 1024
# assumed: blocks of unlike sizes do not fill what the allocator holds
_PACKED_FRAC = 0.95


@dataclass(frozen=True)
class PhaseMemory:
    """The peak of a phase."""

    parts: Mapping[Part, float]
    """GiB of live tensors by what they are for."""
    runtime_gib: float
    """What the device keeps for itself; 0 where it is not known to."""

    @property
    def tensors_gib(self) -> float:
        """All live tensors."""
        return sum(self.parts.values())

    @property
    def total_gib(self) -> float:
        """Tensors and runtime."""
        return self.tensors_gib + self.runtime_gib


@dataclass(frozen=True)
class Times:
    """Predicted seconds."""

    step_s: float
    """Of an optimizer step over examples of average length."""
    epoch_s: float
    """Of as many steps as the training set takes."""
    run_s: float
    """Training, validations, answers; every answer as long as allowed."""


@dataclass(frozen=True)
class Prediction:
    """What a run of a placement will take."""

    plan: ModulePlan
    dtype: str
    quantization: str | None
    checkpointing: bool
    micro_batch_tokens: int
    memory: Mapping[Phase, PhaseMemory]
    times: Times | None
    """None: the device's speed is not known."""
    capacity_gib: float
    """Of the device."""

    @property
    def peak_gib(self) -> float:
        """Of all phases."""
        return max(phase.total_gib for phase in self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device holds it, with room for blocks that do not pack."""
        return self.peak_gib <= _PACKED_FRAC * self.capacity_gib

    @property
    def num_together(self) -> int:
        """Runs of this kind that one base and the device's memory hold at once."""
        train = self.memory["train"]
        base = train.parts.get("weights", 0.0)
        each = train.tensors_gib - base
        free = self.capacity_gib - train.runtime_gib - base
        return max(1, int(USABLE_FRAC * free / each))

    @property
    def adapter_mib(self) -> float:
        """Of the file that is saved, in fp32."""
        return self.plan.trainable_params * 4 / 2**20


@dataclass(frozen=True)
class Traces:
    """What was traced of a run; it depends on the kind of device and not on its size."""

    plan: ModulePlan
    config: Config
    dtype: torch.dtype
    full_step: Trace
    """A step whose passes fill their budget; its memory, not its work."""
    usual_step: Trace
    """A step over examples of average length."""
    scoring: Trace
    """A pass that fills its budget."""
    scored_examples: int
    """Examples in it."""
    first_tokens: Trace
    """Of a batch of answers."""
    last_tokens: Trace


def dtype_on(device: Device, *, asked: str) -> torch.dtype:
    """Returns the dtype that a run would take on a device: what is asked, or what it multiplies."""
    if asked != "auto":
        found: torch.dtype = getattr(torch, asked)
        return found
    if device.has_bf16:
        return torch.bfloat16
    return torch.float16 if device.is_gpu else torch.float32


def trace_run(
    config: Config,
    *,
    plan: ModulePlan,
    architecture: Mapping[str, Any],
    device: Device,
    lengths: Lengths,
) -> Traces:
    """Returns the traces of a run, taken without weights.

    Args:
        config: The run's configuration.
        plan: Its modules.
        architecture: The model's Transformers configuration.
        device: Where it will run; only what kind of device it is matters here.
        lengths: Of the examples.
    """
    dtype = dtype_on(device, asked=config.dtype)
    base = pretend_base(
        architecture, dtype=dtype, trains=plan.is_full, quantization=config.quantization
    )
    adapter = pretend_adapter(base, plan=plan, dropout=config.lora.dropout)
    granule = GRANULE if device.is_gpu else 1
    train, evaluate = config.train, config.eval
    longest = config.data.max_tokens
    full = full_pass(
        lengths, budget=train.micro_batch_tokens, most=train.batch_size, longest=longest
    )
    scored = full_pass(
        lengths,
        budget=evaluate.batch_tokens,
        most=lengths.num_validation(config),
        longest=longest,
    )
    prompt, _ = lengths.example()
    kind = kind_of(device, plan=plan)
    with pretending(kind):
        adapter = fill(base, adapter) if kind == "cpu" else adapter
        more: dict[str, Any] = {"adapter": adapter, "granule": granule}
        usual = made_up_examples(usual_batch(lengths, config))
        usual_step = trace_step(base, config=config, examples=usual, **more)
        filled = made_up_examples(full)
        full_step = (
            usual_step
            if _largest(usual, config) >= _largest(filled, config)
            else trace_step(base, config=config, examples=filled, counts_work=False, **more)
        )
        scoring = trace_scoring(base, examples=made_up_examples(scored), **more)
        answers = trace_answers(
            base,
            num_prompts=max(1, min(evaluate.generate_batch_size, evaluate.generate_examples)),
            prompt_tokens=prompt,
            new_tokens=evaluate.max_new_tokens,
            **more,
        )
    return Traces(
        plan=plan,
        config=config,
        dtype=dtype,
        full_step=full_step,
        usual_step=usual_step,
        scoring=scoring,
        scored_examples=len(scored),
        first_tokens=answers.first,
        last_tokens=answers.last,
    )


def kind_of(device: Device, *, plan: ModulePlan) -> Kind:
    """Returns whose code a run takes on a device.

    Autocast, which full fine-tuning needs, does not know the meta device: it is traced as on a CPU.
    """
    if not device.is_gpu or plan.is_full:
        return "cpu"
    return "gpu" if device.has_bf16 else "old gpu"


def _largest(examples: Sequence[Example], config: Config) -> int:
    lengths = [example.num_tokens for example in examples]
    return largest_pass(lengths, budget=config.train.micro_batch_tokens)


def predict_run(
    traces: Traces, *, device: Device, lengths: Lengths, rates: Rates | None
) -> Prediction:
    """Returns what a run takes on a device of the kind that was traced.

    Args:
        traces: From `trace_run`.
        device: Where it will run.
        lengths: As given to `trace_run`.
        rates: Of the device; None: not known.
    """
    config = traces.config
    by_phase: dict[Phase, Trace] = {
        "train": max(traces.full_step, traces.usual_step, key=lambda trace: trace.peak),
        "evaluate": traces.scoring,
        "generate": max(traces.first_tokens, traces.last_tokens, key=lambda trace: trace.peak),
    }
    runtime = runtime_gib(device)
    return Prediction(
        plan=traces.plan,
        dtype=dtype_name(traces.dtype),
        quantization=config.quantization,
        checkpointing=config.train.gradient_checkpointing,
        micro_batch_tokens=config.train.micro_batch_tokens,
        memory={
            phase: PhaseMemory({part: count / GIB for part, count in trace.parts.items()}, runtime)
            for phase, trace in by_phase.items()
        },
        times=_times(traces, lengths=lengths, rates=rates) if rates else None,
        capacity_gib=device.memory_gib,
    )


def runtime_gib(device: Device) -> float:
    """Returns what a device keeps for itself: context, kernels and the workspace of products."""
    return _CONTEXT_GIB + _WORKSPACE_GIB if device.is_gpu else 0.0


def _times(traces: Traces, *, lengths: Lengths, rates: Rates) -> Times:
    config = traces.config
    train, evaluate = config.train, config.eval
    step = traces.usual_step.work.seconds(rates)
    num_scored = lengths.num_validation(config)
    validation = traces.scoring.work.seconds(rates) * num_scored / traces.scored_examples
    validations = 1 + ((train.max_steps - 1) // evaluate.every_steps if evaluate.every_steps else 0)
    # A batch of answers grows from the first pass to the last.
    first, last = (trace.work.seconds(rates) for trace in (traces.first_tokens, traces.last_tokens))
    batches = evaluate.generate_examples / evaluate.generate_batch_size
    answers = batches * (first + (evaluate.max_new_tokens - 1) * last)
    return Times(
        step_s=step,
        epoch_s=step * lengths.num_train(config) / train.batch_size,
        run_s=train.max_steps * step + validations * validation + answers,
    )
