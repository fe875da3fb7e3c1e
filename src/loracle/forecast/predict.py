"""Predicts memory by part and time of a run on a device, by tracing the code that will run.

Three properties of a GPU that the tracing CPU lacks are modelled, each by name: its attention
kernel (`loracle.forecast.meta_base`), the granule of its allocator (``GRANULE``), and the memory
that its runtime takes (``runtime_gib``).
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
from loracle.forecast.meta_base import model_without_weights
from loracle.forecast.op_costs import Rates
from loracle.forecast.trace import (
    AnswersTrace,
    Trace,
    synthetic_examples,
    trace_answers,
    trace_measuring,
    trace_scoring,
    trace_step,
)
from loracle.model.live_bytes import Part
from loracle.placement import ModulePlan
from loracle.text import GIB

Phase = Literal["train", "evaluate", "generate", "measure"]

# source: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize
GRANULE = 512
# assumed: context and kernels of CUDA 12 and 13 on one device, as nvidia-smi shows them when idle
_CONTEXT_GIB = 0.45
# source: PyTorch's notes on CUDA, CUBLAS_WORKSPACE_CONFIG: 8 MiB, from Hopper on 32 MiB
_WORKSPACE_GIB = 32 / 1024
# assumed: blocks of different sizes leave gaps in the allocator's segments
_PACKED_FRAC = 0.95


@dataclass(frozen=True)
class PhaseMemory:
    """Peak memory of a phase."""

    parts: Mapping[Part, float]
    """Live tensors by purpose, GiB."""
    runtime_gib: float
    """Memory that the device's runtime takes; 0 on a CPU."""

    @property
    def tensors_gib(self) -> float:
        """All live tensors, GiB."""
        return sum(self.parts.values())

    @property
    def total_gib(self) -> float:
        """Tensors and runtime, GiB."""
        return self.tensors_gib + self.runtime_gib


@dataclass(frozen=True)
class Times:
    """Predicted times, in seconds."""

    step_s: float
    """An optimizer step over examples of average length."""
    epoch_s: float
    """The steps of one pass over the training set."""
    training_s: float
    """All steps of a run."""
    validation_s: float
    """All validations of a run."""
    answers_s: float
    """All answers, each at its maximum length."""

    @property
    def run_s(self) -> float:
        """Training, validations and answers.

        The untuned base is evaluated once per study and not included.
        """
        return self.training_s + self.validation_s + self.answers_s


@dataclass(frozen=True)
class Prediction:
    """Predicted memory and time of a run of a placement."""

    plan: ModulePlan
    dtype: str
    quantization: str | None
    checkpointing: bool
    micro_batch_tokens: int
    memory: Mapping[Phase, PhaseMemory]
    times: Times | None
    """None: the device's speed is unknown."""
    capacity_gib: float
    """Memory of the device."""

    @property
    def largest_phase(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.memory, key=lambda phase: self.memory[phase].total_gib)

    @property
    def peak_gib(self) -> float:
        """Highest peak of all phases, GiB."""
        return self.memory[self.largest_phase].total_gib

    @property
    def fits(self) -> bool:
        """Whether the device holds the run, with room for fragmentation."""
        return self.peak_gib <= _PACKED_FRAC * self.capacity_gib

    @property
    def num_together(self) -> int:
        """Runs of this kind that train at once on one base in the device's memory."""
        train = self.memory["train"]
        base = train.parts.get("weights", 0.0)
        per_run = train.tensors_gib - base
        free = self.capacity_gib - train.runtime_gib - base
        return max(1, int(USABLE_FRAC * free / per_run))

    @property
    def adapter_mib(self) -> float:
        """Size of the saved adapter, in fp32."""
        return self.plan.trainable_params * 4 / 2**20


@dataclass(frozen=True)
class Traces:
    """Traces of a run; they depend on the kind of device and not on its size."""

    plan: ModulePlan
    config: Config
    dtype: torch.dtype
    full_step: Trace
    """A step whose passes fill their budget; for its memory only."""
    usual_step: Trace
    """A step over examples of average length."""
    scoring: Trace
    """A scoring pass that fills its budget."""
    scored_examples: int
    """Examples in that pass."""
    answers: AnswersTrace
    """First and last token of a batch of answers."""
    measuring: Trace | None
    """Audit and merged latency; None for full fine-tuning, which audits without its base."""


def dtype_on(device: Device, *, requested: str) -> torch.dtype:
    """Returns the dtype of a run on a device; ``auto`` is the one that the device multiplies."""
    if requested != "auto":
        dtype: torch.dtype = getattr(torch, requested)
        return dtype
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
    only_times: bool = False,
) -> Traces:
    """Returns the traces of a run, taken without weights; of ``device`` only the kind matters.

    ``only_times`` leaves out the full step and the measuring, which only memory needs.
    """
    dtype = dtype_on(device, requested=config.dtype)
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
    with model_without_weights(
        architecture,
        plan=plan,
        device=device,
        dtype=dtype,
        dropout=config.lora.dropout,
        quantization=config.quantization,
    ) as (base, adapter):
        granule = GRANULE if device.is_gpu else 1
        more: dict[str, Any] = {"adapter": adapter, "granule": granule}
        usual = synthetic_examples(usual_batch(lengths, config))
        usual_step = trace_step(base, config=config, examples=usual, **more)
        filled = synthetic_examples(full)
        full_step = (
            usual_step
            if only_times or _largest(usual, config) >= _largest(filled, config)
            else trace_step(base, config=config, examples=filled, counts_work=False, **more)
        )
        scoring = trace_scoring(base, examples=synthetic_examples(scored), **more)
        answers = trace_answers(
            base,
            num_prompts=max(1, min(evaluate.generate_batch_size, evaluate.generate_examples)),
            prompt_tokens=prompt,
            new_tokens=evaluate.max_new_tokens,
            **more,
        )
        measuring = (
            None if only_times or plan.is_full else trace_measuring(base, longest=longest, **more)
        )
    return Traces(
        plan=plan,
        config=config,
        dtype=dtype,
        full_step=full_step,
        usual_step=usual_step,
        scoring=scoring,
        scored_examples=len(scored),
        answers=answers,
        measuring=measuring,
    )


def _largest(examples: Sequence[Example], config: Config) -> int:
    lengths = [example.num_tokens for example in examples]
    return largest_pass(lengths, budget=config.train.micro_batch_tokens)


def predict_run(
    traces: Traces, *, device: Device, lengths: Lengths, rates: Rates | None
) -> Prediction:
    """Returns the memory and time of a run on a device of the kind that was traced.

    Without ``rates`` no times are predicted.
    """
    config = traces.config
    by_phase: dict[Phase, Trace] = {
        "train": max(traces.full_step, traces.usual_step, key=lambda trace: trace.peak),
        "evaluate": traces.scoring,
        "generate": max(traces.answers.first, traces.answers.last, key=lambda trace: trace.peak),
    }
    if traces.measuring is not None:
        by_phase["measure"] = traces.measuring
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
    """Returns the memory that a device's runtime takes: context, kernels, cuBLAS workspace."""
    return _CONTEXT_GIB + _WORKSPACE_GIB if device.is_gpu else 0.0


def _times(traces: Traces, *, lengths: Lengths, rates: Rates) -> Times:
    config = traces.config
    train, evaluate = config.train, config.eval
    step = traces.usual_step.work.seconds(rates)
    num_scored = lengths.num_validation(config)
    validation = traces.scoring.work.seconds(rates) * num_scored / traces.scored_examples
    first, last = (
        trace.work.seconds(rates) for trace in (traces.answers.first, traces.answers.last)
    )
    batches = evaluate.generate_examples / evaluate.generate_batch_size
    # Upper bound: every later token is taken to cost as much as the last.
    answers = batches * (first + (evaluate.max_new_tokens - 1) * last)
    return Times(
        step_s=step,
        epoch_s=step * lengths.num_train(config) / train.batch_size,
        training_s=train.max_steps * step,
        validation_s=config.num_validations * validation,
        answers_s=answers,
    )
