"""The result of a run: ``result.json`` and ``examples.jsonl``, assembled from what was measured.

Units are in the names. A value that was not measured is null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from loracle.config.run import Config
from loracle.data import Example
from loracle.engine.evaluate import Answer, ExampleScore, TextScore, likelihood
from loracle.engine.measure import Latency, MemoryMeter, Parameters, step_clock
from loracle.placement import ModulePlan
from loracle.runner.audit import Audit
from loracle.runner.criteria import (
    Criterion,
    Repeat,
    convergence,
    efficiency,
    reproducibility,
    validation,
)
from loracle.runner.trunk import TrunkUse

SCHEMA = 1


@dataclass(frozen=True)
class Measured:
    """Everything that was measured in a run."""

    base_scores: Sequence[ExampleScore]
    tuned_scores: Sequence[ExampleScore]
    base_text: TextScore | None
    tuned_text: TextScore | None
    step_rows: Sequence[dict[str, Any]]
    probed_rows: Sequence[Mapping[str, Any]] | None
    """Steps of the arm alone, where the run's own were shared; None: its own are the clock."""
    trunk: TrunkUse | None
    """The kept hidden states that its steps began from; None: they began from the tokens."""
    memory: MemoryMeter
    latency: Mapping[str, Latency | None]
    audit: Audit
    adapter_sha256: str


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
) -> dict[str, Any]:
    """Returns the result of a run as plain data.

    Args:
        config: The run's configuration.
        signature: What the result is a result of.
        environment: Where it was measured.
        arm: What the placement is called.
        plan: The modules that trained.
        train_examples: Size of the training set, for the time of an epoch.
        measured: What was measured.
        repeats: Finished runs with the same signature.
    """
    parameters = Parameters(plan.trainable_params, plan.base_params)
    return {
        "schema": SCHEMA,
        "status": "failed" if measured.audit.faults() else "completed",
        "signature": signature,
        "arm": arm,
        "placement": plan.placement,
        "seed": config.seed,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": environment["device"]["name"],
        "quality": {
            "base": _quality(measured.base_scores, measured.base_text),
            "tuned": _quality(measured.tuned_scores, measured.tuned_text),
        },
        "efficiency": _efficiency(config, parameters, train_examples, measured),
        "criteria": {
            name: criterion.to_json()
            for name, criterion in _criteria(measured, parameters, repeats).items()
        },
        "audit": measured.audit.to_json(),
        "adapter_sha256": measured.adapter_sha256,
    }


def _quality(scores: Sequence[ExampleScore], text: TextScore | None) -> dict[str, Any]:
    found = likelihood(scores)
    return {
        "loss_nats_per_token": found.loss_nats_per_token,
        "perplexity": found.perplexity,
        "num_examples": found.num_examples,
        "num_targets": found.num_targets,
        "bleu": text and text.bleu,
        "bleu_signature": text and text.bleu_signature,
        "chrf": text and text.chrf,
        "chrf_signature": text and text.chrf_signature,
        "num_answers": text and text.num_answers,
        "hit_limit_frac": text and text.hit_limit_frac,
    }


def _efficiency(
    config: Config, parameters: Parameters, train_examples: int, measured: Measured
) -> dict[str, Any]:
    probed = measured.probed_rows
    clock = step_clock(measured.step_rows if probed is None else probed)
    steps_per_epoch = train_examples / config.train.batch_size
    memory = measured.memory
    return {
        "measured": _how_measured(probed),
        "trainable_params": parameters.trainable,
        "total_params": parameters.total,
        "trainable_frac": parameters.trainable_frac,
        "full_finetune_params": parameters.base,
        "step_time_s": {
            "median": clock and clock.median_s,
            "p25": clock and clock.p25_s,
            "p75": clock and clock.p75_s,
            "num_steps": clock.num_steps if clock else 0,
        },
        "epoch_time_s": clock and clock.mean_s * steps_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "throughput_tokens_per_s": clock and clock.tokens_per_s,
        "peak_memory_gib": {
            "kind": memory.kind,
            **{key: memory.peaks_gib.get(key) for key in ("load", "train", "evaluate", "generate")},
            "reserved": dict(memory.reserved_gib) or None,
            "train_tensors": memory.tensors_gib.get("train"),
        },
        "latency_ms_per_token": {
            name: found and found.ms_per_token for name, found in measured.latency.items()
        },
        "latency_first_token_ms": {
            name: found and found.first_token_ms for name, found in measured.latency.items()
        },
        "trunk": measured.trunk and measured.trunk.to_json(),
    }


def _how_measured(probed: Sequence[Mapping[str, Any]] | None) -> str:
    """Returns what the clock and the memory are of; never of a step that others shared."""
    if probed is None:
        return "whole run, alone"
    return f"probe of {sum(row['clocked'] for row in probed)} steps, alone"


def _criteria(
    measured: Measured, parameters: Parameters, repeats: Sequence[Repeat]
) -> dict[str, Criterion]:
    losses = tuple(row["loss_nats_per_token"] for row in measured.step_rows)
    this = Repeat(
        name="this run",
        adapter_sha256=measured.adapter_sha256,
        losses=losses,
        final_loss_nats_per_token=likelihood(measured.tuned_scores).loss_nats_per_token,
    )
    return {
        "convergence": convergence(losses),
        "validation": validation(measured.base_scores, measured.tuned_scores),
        "efficiency": efficiency(parameters),
        "reproducibility": reproducibility(this, others=repeats),
    }


def example_rows(
    examples: Sequence[Example],
    *,
    base_scores: Sequence[ExampleScore],
    tuned_scores: Sequence[ExampleScore],
    answers: Mapping[str, Sequence[Answer]],
) -> Iterator[dict[str, Any]]:
    """Yields a row of ``examples.jsonl`` per validation example, scored, answered or both.

    Args:
        examples: Validation examples in order.
        base_scores: Scores by the untuned model of the first so many of them.
        tuned_scores: Scores by the tuned model of the same.
        answers: Under ``base`` and ``tuned``, answers to the first so many instructions.
    """
    shown = max(len(tuned_scores), len(answers["tuned"]))
    for index, example in enumerate(examples[:shown]):
        tuned, base = _nth(tuned_scores, index), _nth(base_scores, index)
        said, base_said = _nth(answers["tuned"], index), _nth(answers["base"], index)
        yield {
            "row": example.record.row,
            "instruction": example.record.instruction,
            "input": example.record.input,
            "reference": example.record.output,
            "tokens": example.num_targets,
            "nll_sum_nats": tuned and tuned.nll_sum_nats,
            "base_nll_sum_nats": base and base.nll_sum_nats,
            "generated": said and said.text,
            "base_generated": base_said and base_said.text,
            "hit_limit": said and said.hit_limit,
            "base_hit_limit": base_said and base_said.hit_limit,
        }


def _nth(items: Sequence[Any], index: int) -> Any:
    return items[index] if index < len(items) else None
