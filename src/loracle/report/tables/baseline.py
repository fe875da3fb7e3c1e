"""Runs of one configuration, several seeds, as a Markdown table that says where it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import reduce
from typing import Any

from loracle.analysis.comparison import Comparison
from loracle.analysis.verdicts import judge
from loracle.config.bleu import DEFAULT
from loracle.records.find_runs import without_seed
from loracle.records.result import RunResult
from loracle.records.study_folder import StudyRecord
from loracle.report.text.limits import data_warnings
from loracle.report.text.markdown import markdown_code, markdown_paragraph
from loracle.report.text.numbers import NOT_MEASURED, interval_words
from loracle.text import plural


def baseline_table(study: StudyRecord) -> str:
    """Returns the quality and cost of one configuration over its seeds, with provenance.

    Changes in loss, perplexity and BLEU carry intervals over seeds and examples, as a study's
    comparisons do; with one seed there is no interval.

    Args:
        study: Runs of one arm, see `records.lone_runs`.
    """
    results = [run.result for run in study.runs]
    changes = _changes(study, results)
    lines = [
        f"| | untuned | tuned | change [{interval_words(study.coverage)}] |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {_mean(results, ('quality', 'base', key), spec)} | "
            f"{_mean(results, ('quality', 'tuned', key), spec)} | {changes[key]} |"
            for name, key, spec in _QUALITY
        ),
        "",
        "| | mean [lowest to highest run] |",
        "|---|---:|",
        *(
            f"| {name} | {_spread(results, ('efficiency', *path), spec)} |"
            for name, path, spec in _COST
        ),
        "",
        markdown_paragraph(_measured_on(results, coverage=study.coverage)),
        "",
        *(markdown_paragraph(f"Warning: {line}.") + "\n" for line in data_warnings(study)),
        f"Signature: {markdown_code(without_seed(results[0].signature))}",
    ]
    return "\n".join(lines)


def _changes(study: StudyRecord, results: Sequence[RunResult]) -> dict[str, str]:
    """Returns tuned minus untuned by metric, in words."""
    verdicts = judge(study)
    loss = verdicts.against_untuned(study.reference)
    bleu = verdicts.against_untuned(study.reference, metric="bleu")
    return {
        "perplexity": _change(
            loss.effect_percent if loss else None,
            loss.effect_percent_interval if loss else None,
            "+.1f",
            " %",
        ),
        "loss_nats_per_token": _of(loss, "+.3f"),
        "bleu": _of(bleu, "+.2f"),
        # No interval: chrF's counts per answer are not recorded.
        "chrf": _change(_mean_change(results, "chrf"), None, "+.2f"),
    }


def _of(comparison: Comparison | None, spec: str) -> str:
    if comparison is None:
        return NOT_MEASURED
    return _change(comparison.difference, comparison.interval, spec)


def _mean_change(results: Sequence[RunResult], key: str) -> float | None:
    pairs = [(getattr(r.quality.base, key), getattr(r.quality.tuned, key)) for r in results]
    if any(None in pair for pair in pairs):
        return None
    return statistics.fmean(after - before for before, after in pairs)


def _change(
    value: float | None, interval: tuple[float, float] | None, spec: str, unit: str = ""
) -> str:
    if value is None:
        return NOT_MEASURED
    if interval is None:
        return f"{value:{spec}}{unit} (no interval)"
    return f"{value:{spec}}{unit} [{interval[0]:{spec}}, {interval[1]:{spec}}]"


def _measured_on(results: Sequence[RunResult], *, coverage: float) -> str:
    first = results[0]
    tuned = first.quality.tuned
    by = "" if tuned.tokenizer == DEFAULT else f" (BLEU's tokenizer: {tuned.tokenizer})"
    seeds = ", ".join(str(result.seed) for result in results)
    return (
        f"{plural(len(results), 'seed')} ({seeds}). "
        f"{_means_and_intervals(len(results), coverage=coverage)} "
        f"Perplexity and loss on {tuned.num_examples:,} held-out examples "
        f"({tuned.num_targets:,} tokens), BLEU and chrF on {tuned.num_answers or 0:,} greedy "
        f"answers{by}. {first.device}, {first.finished_at[:10]}."
    )


def _means_and_intervals(num_seeds: int, *, coverage: float) -> str:
    if num_seeds < 2:
        return "Without a second seed there is no interval."
    level = f"{100 * coverage:g} %"
    return f"Untuned and tuned: means over seeds; intervals: {level}, over seeds and examples."


def _mean(results: Sequence[RunResult], path: Sequence[str], spec: str) -> str:
    values: list[Any] = [reduce(getattr, path, result) for result in results]
    return NOT_MEASURED if None in values else format(statistics.fmean(values), spec)


def _spread(results: Sequence[RunResult], path: Sequence[str], spec: str) -> str:
    values: list[Any] = [reduce(getattr, path, result) for result in results]
    if None in values:
        return NOT_MEASURED
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
