"""Runs of one configuration, several seeds, as a Markdown table that says where it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import reduce
from typing import Any

from loracle.records.find_runs import without_seed
from loracle.records.result import RunResult


def baseline_table(results: Sequence[RunResult]) -> str:
    """Returns quality and cost over seeds: mean, and lowest to highest, with provenance.

    Args:
        results: Results of one configuration with different seeds.
    """
    lines = [
        "| | untuned | tuned | change |",
        "|---|---:|---:|---:|",
        *(_quality_row(results, name, key, spec) for name, key, spec in _QUALITY),
        "",
        "| | |",
        "|---|---:|",
        *(
            f"| {name} | {_spread(results, ('efficiency', *path), spec)} |"
            for name, path, spec in _COST
        ),
        "",
        _measured_on(results),
        "",
        f"Signature: `{without_seed(results[0].signature)}`",
    ]
    return "\n".join(lines)


def _measured_on(results: Sequence[RunResult]) -> str:
    first = results[0]
    tuned = first.quality.tuned
    seeds = ", ".join(str(result.seed) for result in results)
    return (
        f"n = {len(results)} seed(s) ({seeds}); mean, and lowest to highest in brackets. "
        f"Perplexity and loss on {tuned.num_examples:,} held-out examples "
        f"({tuned.num_targets:,} tokens), BLEU and chrF on {tuned.num_answers or 0:,} greedy "
        f"answers. {first.device}, {first.finished_at[:10]}."
    )


def _quality_row(results: Sequence[RunResult], name: str, key: str, spec: str) -> str:
    before, after = (_spread(results, ("quality", model, key), spec) for model in ("base", "tuned"))
    return f"| {name} | {before} | {after} | {_change(results, key)} |"


def _change(results: Sequence[RunResult], key: str) -> str:
    pairs = [(getattr(r.quality.base, key), getattr(r.quality.tuned, key)) for r in results]
    if any(value is None for pair in pairs for value in pair):
        return "n/a"
    if key == "perplexity":
        return _range([after / before - 1 for before, after in pairs], "+.1%")
    return _range([after - before for before, after in pairs], "+.2f")


def _spread(results: Sequence[RunResult], path: Sequence[str], spec: str) -> str:
    found: list[Any] = [reduce(getattr, path, result) for result in results]
    return "n/a" if None in found else _range(found, spec)


def _range(values: Sequence[float], spec: str) -> str:
    low, high = format(min(values), spec), format(max(values), spec)
    mean = format(statistics.fmean(values), spec)
    return mean if low == high else f"{mean} [{low} to {high}]"


_QUALITY = (
    ("perplexity", "perplexity", ".3f"),
    ("loss, nats per token", "loss_nats_per_token", ".3f"),
    ("BLEU", "bleu", ".2f"),
    ("chrF", "chrf", ".2f"),
)


_COST = (
    ("trainable parameters", ("trainable_params",), ",.0f"),
    ("full fine-tuning would train", ("full_finetune_params",), ",.0f"),
    ("time per step, s (median of each run)", ("step_time_s", "median"), ".2f"),
    ("time per epoch, s", ("epoch_time_s",), ".0f"),
    ("tokens per second, training", ("throughput_tokens_per_s",), ",.0f"),
    ("peak memory in training, GiB", ("peak_memory_gib", "train"), ".2f"),
    ("latency of the base, ms per token", ("latency_ms_per_token", "base"), ".1f"),
    ("latency unmerged, ms per token", ("latency_ms_per_token", "unmerged"), ".1f"),
    ("latency merged, ms per token", ("latency_ms_per_token", "merged"), ".1f"),
)
