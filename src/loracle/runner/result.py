"""The result of a run and its ``examples.jsonl``, assembled from the measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from loracle.config.run import Config
from loracle.data import Example
from loracle.engine.answers import Answer, TextScore
from loracle.engine.evaluate import ExampleScore, likelihood
from loracle.engine.latency import Latency
from loracle.engine.measure import MemoryMeter, Parameters, step_clock
from loracle.placement import ModulePlan
from loracle.records.result import (
    SCHEMA,
    Audit,
    ByAdapterState,
    Criteria,
    Efficiency,
    ModelQuality,
    PeakMemory,
    Quality,
    RunResult,
    StepTime,
    Trunk,
)
from loracle.records.rows import ExampleRow
from loracle.runner.criteria import (
    Repeat,
    convergence,
    efficiency,
    reproducibility,
    validation,
)
from loracle.runner.trunk import TrunkUse

_TEXT_SCORES = [field.name for field in fields(TextScore)]


@dataclass(frozen=True)
class Measured:
    """All measurements of a run."""

    base_scores: Sequence[ExampleScore]
    tuned_scores: Sequence[ExampleScore]
    base_text: TextScore | None
    tuned_text: TextScore | None
    step_rows: Sequence[dict[str, Any]]
    probed_rows: Sequence[Mapping[str, Any]] | None
    """Steps of the arm alone, where the run's own were shared; None: the run's own are clocked."""
    trunk: TrunkUse | None
    """Cached hidden states that the steps started from; None: they started from the tokens."""
    memory: MemoryMeter
    latency: Mapping[str, Latency | None]
    audit: Audit
    adapter_sha256: str
    validations: Mapping[int, Sequence[ExampleScore]] = field(default_factory=dict)
    """Scores of the tuned model during training, by step."""


def build_result(
    *,
    config: Config,
    signature: str,
    environment: Mapping[str, Any],
    arm: str,
    plan: ModulePlan,
    train_examples: int,
    measured: Measured,
    repeats: Sequence[Repeat],
    data_warnings: Sequence[str] = (),
) -> RunResult:
    """Returns the result of a run.

    ``train_examples`` sets the steps of an epoch; ``repeats`` are finished runs of its signature;
    ``data_warnings`` are those of ``data.json``.
    """
    parameters = Parameters(plan.trainable_params, plan.base_params)
    return RunResult(
        schema=SCHEMA,
        status="failed" if measured.audit.faults else "completed",
        signature=signature,
        arm=arm,
        placement=plan.placement,
        seed=config.seed,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        device=environment["device"]["name"],
        quality=Quality(
            base=_quality(measured.base_scores, measured.base_text),
            tuned=_quality(measured.tuned_scores, measured.tuned_text),
        ),
        efficiency=_efficiency(config, parameters, train_examples, measured),
        criteria=_criteria(measured, parameters, repeats),
        audit=measured.audit,
        adapter_sha256=measured.adapter_sha256,
        data_warnings=list(data_warnings),
    )


def _quality(scores: Sequence[ExampleScore], text: TextScore | None) -> ModelQuality:
    result = likelihood(scores)
    return ModelQuality(
        loss_nats_per_token=result.loss_nats_per_token,
        perplexity=result.perplexity,
        num_examples=result.num_examples,
        num_targets=result.num_targets,
        **(asdict(text) if text else dict.fromkeys(_TEXT_SCORES)),
    )


def _efficiency(
    config: Config, parameters: Parameters, train_examples: int, measured: Measured
) -> Efficiency:
    probed, memory, trunk = measured.probed_rows, measured.memory, measured.trunk
    clock = step_clock(measured.step_rows if probed is None else probed)
    steps_per_epoch = train_examples / config.train.batch_size
    latency = measured.latency
    return Efficiency(
        measured=_how_measured(probed),
        trainable_params=parameters.trainable,
        total_params=parameters.total,
        trainable_frac=parameters.trainable_frac,
        full_finetune_params=parameters.base,
        step_time_s=StepTime(clock.median_s, clock.p25_s, clock.p75_s, clock.num_steps)
        if clock
        else StepTime(None, None, None, 0),
        epoch_time_s=clock.mean_s * steps_per_epoch if clock else None,
        steps_per_epoch=steps_per_epoch,
        throughput_tokens_per_s=clock.tokens_per_s if clock else None,
        peak_memory_gib=PeakMemory(
            kind=memory.kind,
            **{key: memory.peaks_gib.get(key) for key in ("load", "train", "evaluate", "generate")},
            reserved=dict(memory.reserved_gib) or None,
            train_tensors=memory.tensors_gib.get("train"),
        ),
        latency_ms_per_token=ByAdapterState(
            **{state: time.ms_per_token if time else None for state, time in latency.items()}
        ),
        latency_first_token_ms=ByAdapterState(
            **{state: time.first_token_ms if time else None for state, time in latency.items()}
        ),
        trunk=Trunk(trunk.layer, trunk.kept_gib, trunk.fill_time_s) if trunk else None,
    )


def _how_measured(probed: Sequence[Mapping[str, Any]] | None) -> str:
    """Returns in which steps time and memory were measured."""
    if probed is None:
        return "whole run, alone"
    return f"probe of {sum(row['clocked'] for row in probed)} steps, alone"


def _criteria(measured: Measured, parameters: Parameters, repeats: Sequence[Repeat]) -> Criteria:
    losses = tuple(row["loss_nats_per_token"] for row in measured.step_rows)
    this = Repeat(
        name="this run",
        adapter_sha256=measured.adapter_sha256,
        losses=losses,
        final_loss_nats_per_token=likelihood(measured.tuned_scores).loss_nats_per_token,
    )
    return Criteria(
        convergence=convergence(
            measured.base_scores,
            {**measured.validations, len(losses): measured.tuned_scores},
            losses=losses,
        ),
        validation=validation(measured.base_scores, measured.tuned_scores),
        efficiency=efficiency(parameters),
        reproducibility=reproducibility(this, others=repeats),
    )


def example_rows(
    examples: Sequence[Example],
    *,
    base_scores: Sequence[ExampleScore],
    tuned_scores: Sequence[ExampleScore],
    answers: Mapping[str, Sequence[Answer]],
) -> Iterator[ExampleRow]:
    """Yields a row of ``examples.jsonl`` per validation example that was scored or answered.

    Scores and answers (under ``base`` and ``tuned``) belong to the first examples, in order.
    """
    shown = max(len(tuned_scores), len(answers["tuned"]))
    for index, example in enumerate(examples[:shown]):
        tuned, base = _nth(tuned_scores, index), _nth(base_scores, index)
        answer, base_answer = _nth(answers["tuned"], index), _nth(answers["base"], index)
        yield {
            "row": example.record.row,
            "instruction": example.record.instruction,
            "input": example.record.input,
            "reference": example.record.output,
            "tokens": example.num_targets,
            "nll_sum_nats": tuned and tuned.nll_sum_nats,
            "base_nll_sum_nats": base and base.nll_sum_nats,
            "generated": answer and answer.text,
            "base_generated": base_answer and base_answer.text,
            "hit_limit": answer and answer.hit_limit,
            "base_hit_limit": base_answer and base_answer.hit_limit,
        }


def _nth(items: Sequence[Any], index: int) -> Any:
    return items[index] if index < len(items) else None
