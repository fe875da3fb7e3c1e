"""The result of a run, the one schema of ``result.json``; a value that was not measured is null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import computed_field

from loracle.config.bleu import tokenizer_in
from loracle.errors import RunFolderError
from loracle.records.files import from_json, read_json
from loracle.records.manifest import require_intact
from loracle.records.names import RESULT
from loracle.records.run_state import REMEDY

SCHEMA = 1
"""Rises when a key changes its meaning or goes; a key that only comes along gets a default."""

MEMORY_KINDS = {
    "tensors": "live tensors, counted",
    "resident_set": "resident set of the process",
    "cuda_allocated": "allocated on the GPU",
}
"""What a memory figure measures, in words."""


def perplexity_of(loss_nats_per_token: float) -> float | None:
    """Returns exp of a loss; None where that is beyond the largest number (709 nats)."""
    try:
        return math.exp(loss_nats_per_token)
    except OverflowError:
        return None


@dataclass(frozen=True)
class ModelQuality:
    """How well one model does on the validation set; None without answers, or without scores."""

    loss_nats_per_token: float
    perplexity: float | None
    """None: beyond the largest number."""
    num_examples: int
    num_targets: int
    """Tokens that the loss is a mean over."""
    bleu: float | None
    """Corpus BLEU of the greedy answers, 0 to 100."""
    bleu_signature: str | None
    """sacreBLEU's."""
    chrf: float | None
    """Corpus chrF of the greedy answers, 0 to 100."""
    chrf_signature: str | None
    """sacreBLEU's."""
    num_answers: int | None
    hit_limit_frac: float | None
    """Fraction of the answers that were cut at the token limit."""
    bleu_tokenize: str | None = None
    """sacreBLEU's name of BLEU's tokenizer; None also in results older than the choice."""

    @property
    def tokenizer(self) -> str:
        """The tokenizer that BLEU was counted with, by its signature in older results."""
        return self.bleu_tokenize or tokenizer_in(self.bleu_signature)


@dataclass(frozen=True)
class Quality:
    """Before and after training."""

    base: ModelQuality
    tuned: ModelQuality


@dataclass(frozen=True)
class StepTime:
    """Seconds per optimizer step, over the clocked steps."""

    median: float | None
    p25: float | None
    p75: float | None
    num_steps: int


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory by phase, in GiB."""

    kind: str
    """What the phases' figures measure, a key of `MEMORY_KINDS`."""
    load: float | None
    train: float | None
    evaluate: float | None
    generate: float | None
    reserved: dict[str, float | None] | None
    """What the GPU's allocator held, by phase; None on a CPU."""
    train_tensors: float | None = None
    """Live tensors in training, counted in the first steps on a CPU; None: not counted, as in
    results older than the counter."""

    @property
    def of_training(self) -> float | None:
        """Peak of a run's tensors in training.

        A GPU counts that itself. On a CPU it is counted in the first steps; the resident set also
        holds Python, libraries and what earlier runs of the process left with the allocator, and
        does not compare between runs.
        """
        return self.train if self.train_tensors is None else self.train_tensors

    @property
    def kind_of_training(self) -> str:
        """What `of_training` measures: a key of `MEMORY_KINDS`."""
        return self.kind if self.train_tensors is None else "tensors"


@dataclass(frozen=True)
class ByAdapterState:
    """A latency of the untuned base, and of its adapter unmerged and merged."""

    base: float | None
    unmerged: float | None
    merged: float | None


@dataclass(frozen=True)
class Trunk:
    """Cached hidden states that the steps started from."""

    layer: int
    """First decoder layer that is computed in a step."""
    kept_gib: float
    """Size of the states."""
    fill_time_s: float | None
    """Time to compute them once; None: they were on the disk."""


@dataclass(frozen=True)
class Efficiency:
    """Parameters, time, memory and latency."""

    measured: str
    """In which steps time and memory were measured; never in a step that other runs shared."""
    trainable_params: int
    total_params: int
    trainable_frac: float
    """Of the total."""
    full_finetune_params: int
    """What full fine-tuning would train."""
    step_time_s: StepTime
    epoch_time_s: float | None
    """Optimizer steps only."""
    steps_per_epoch: float
    throughput_tokens_per_s: float | None
    """Real tokens, without padding."""
    peak_memory_gib: PeakMemory
    latency_ms_per_token: ByAdapterState
    """After the first token."""
    latency_first_token_ms: ByAdapterState
    trunk: Trunk | None
    """None: every step started from the tokens."""


@dataclass(frozen=True)
class Criterion:
    """A success criterion's outcome and its evidence."""

    passed: bool | None
    """None: not judged, since nothing measured decides it or noise forbids to tell."""
    evidence: str
    """One sentence with the figures."""


@dataclass(frozen=True)
class Criteria:
    """The four success criteria of the baseline."""

    convergence: Criterion
    validation: Criterion
    efficiency: Criterion
    reproducibility: Criterion


@dataclass(frozen=True)
class Audit:
    """What a finished run was checked for, and the outcome."""

    updated_modules: int
    """Modules whose lora_B is nonzero and finite; in full fine-tuning, tensors that moved."""
    planned_modules: int
    frozen_weights_unchanged: bool | None
    """None: nothing is frozen in full fine-tuning."""
    trainable_params: int
    planned_params: int
    saved_tensors_exact: bool
    """The file holds the adapter's tensors, bit for bit, and no others."""
    reloaded_loss_nats_per_token: float
    """Of the saved adapter on a fresh base through stock PEFT, one example at a time."""
    recorded_loss_nats_per_token: float
    """Of the run's final validation on the same examples."""
    reloaded_examples: int
    relative_tolerance: float
    example_spread_nats: float | None = None
    """Root mean square of the examples' differences, each over the root of its target tokens."""
    tolerated_spread_nats: float | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reload_difference(self) -> float:
        """Relative difference between the reloaded and the recorded loss."""
        recorded = self.recorded_loss_nats_per_token
        return abs(self.reloaded_loss_nats_per_token - recorded) / (recorded or 1.0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def faults(self) -> list[str]:
        """One sentence for each claim that does not hold."""
        is_full = self.frozen_weights_unchanged is None
        what, library = ("model", "Transformers") if is_full else ("adapter", "PEFT")
        parts, unit = ("weights", "tensors") if is_full else ("lora_B", "modules")
        faults = []
        if self.updated_modules != self.planned_modules:
            faults.append(
                f"{parts} moved in {self.updated_modules} of {self.planned_modules} {unit}"
            )
        if self.frozen_weights_unchanged is False:
            faults.append("frozen weights changed")
        if self.trainable_params != self.planned_params:
            faults.append(f"{self.trainable_params} trainable, {self.planned_params} planned")
        if not self.saved_tensors_exact:
            faults.append(f"the saved tensors are not the {what}'s")
        if not self.reload_difference <= self.relative_tolerance:
            faults.append(
                f"the saved {what} gives {self.reloaded_loss_nats_per_token:.6f} nats per token "
                f"through stock {library}, the run recorded {self.recorded_loss_nats_per_token:.6f}"
            )
        elif not (self.example_spread_nats or 0.0) <= (self.tolerated_spread_nats or 0.0):
            faults.append(
                f"single examples by stock {library} are {self.example_spread_nats:.3g} nats per "
                f"root token off what was recorded; rounding: {self.tolerated_spread_nats:.3g}"
            )
        return faults


@dataclass(frozen=True)
class RunResult:
    """``result.json``."""

    schema: int
    """`SCHEMA` of the version that wrote it."""
    status: Literal["completed", "failed"]
    """Failed: it did not pass its audit."""
    signature: str
    """What the result is a result of (`loracle.records.signature`)."""
    arm: str
    placement: str
    """Label of the placement."""
    seed: int
    finished_at: str
    """ISO 8601, UTC."""
    device: str
    quality: Quality
    efficiency: Efficiency
    criteria: Criteria
    audit: Audit
    adapter_sha256: str
    """Of the file of the trained weights."""
    data_warnings: list[str] = field(default_factory=list)
    """A sentence on the records that were left out, if they are many."""


def read_result(folder: Path, *, verify: bool = True) -> RunResult:
    """Returns the result in a run's folder, whose records must be as they were written.

    ``verify=False`` reads the file alone, without looking at the others. A key that this version
    does not know is ignored: a later one may add it without changing the others.

    Raises:
        RunFolderError: If there is none, its schema is not this version's, a value is missing or
            of another type, or a record is not what its manifest says.
    """
    if verify:
        require_intact(folder, remedy=REMEDY)
    path = folder / RESULT
    return parse_result(read_json(path), origin=f"{path}")


def parse_result(data: Mapping[str, Any], *, origin: str) -> RunResult:
    """Returns a result from plain data, as `read_result` does.

    Raises:
        RunFolderError: As `read_result`.
    """
    if data.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{origin}: schema is {data.get('schema')!r}, this version of loracle reads {SCHEMA}"
        )
    return from_json(RunResult, data, origin=origin)
