"""The result of one run as a table on the terminal."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loracle.records.result import (
    MEMORY_KINDS,
    Criteria,
    Criterion,
    Efficiency,
    ModelQuality,
    Quality,
    RunResult,
)

_VERDICTS = {True: "[green]passed[/]", False: "[red]failed[/]", None: "[yellow]open[/]"}


def result_view(result: RunResult) -> RenderableType:
    """Returns quality, cost and the four success criteria of one run."""
    return Group(
        Padding(_quality(result.quality), (1, 0, 0, 0)),
        Padding(_efficiency(result.efficiency), (1, 0, 0, 0)),
        Padding(_criteria(result.criteria), (1, 0, 0, 0)),
        Padding(Text(_provenance(result), style="dim"), (1, 0)),
    )


def number(value: float | None, spec: str, *, unit: str = "") -> str:
    """Returns a value as text, ``n/a`` if it was not measured."""
    return "n/a" if value is None else f"{value:{spec}}{unit}"


def _quality(quality: Quality) -> Table:
    base, tuned = quality.base, quality.tuned
    table = _table("Quality", "", "untuned", "tuned", "change", "measured on")
    held_out = f"{tuned.num_examples:,} examples, {tuned.num_targets:,} tokens"
    ratio = tuned.perplexity / base.perplexity - 1
    fell = tuned.loss_nats_per_token - base.loss_nats_per_token
    table.add_row(
        "perplexity",
        number(base.perplexity, ".3f"),
        number(tuned.perplexity, ".3f"),
        f"{ratio:+.1%}",
        held_out,
    )
    table.add_row(
        "loss, nats per token",
        number(base.loss_nats_per_token, ".4f"),
        number(tuned.loss_nats_per_token, ".4f"),
        f"{fell:+.4f}",
        held_out,
    )
    table.add_row("BLEU", *_text_cells(base.bleu, tuned.bleu), _answers(tuned))
    table.add_row("chrF", *_text_cells(base.chrf, tuned.chrf), _answers(tuned))
    table.add_row(
        "answers cut at the limit",
        number(base.hit_limit_frac, ".0%"),
        number(tuned.hit_limit_frac, ".0%"),
        "",
        _answers(tuned),
    )
    return table


def _text_cells(base: float | None, tuned: float | None) -> tuple[str, str, str]:
    change = "" if base is None or tuned is None else f"{tuned - base:+.2f}"
    return number(base, ".2f"), number(tuned, ".2f"), change


def _answers(tuned: ModelQuality) -> str:
    count = tuned.num_answers
    return "n/a" if count is None else f"{count:,} greedy answers"


def _efficiency(efficiency: Efficiency) -> Table:
    clock, memory = efficiency.step_time_s, efficiency.peak_memory_gib
    latency, first = efficiency.latency_ms_per_token, efficiency.latency_first_token_ms
    table = _table("Cost", "", "value", "", "note")
    full = efficiency.full_finetune_params
    share = efficiency.trainable_params / full
    table.add_row(
        "trainable parameters",
        f"{efficiency.trainable_params:,}",
        "",
        f"{share:.2%} of the {full:,} of full fine-tuning",
    )
    table.add_row(
        "time per step",
        number(clock.median, ".2f"),
        "s",
        f"median of {clock.num_steps}; quartiles {number(clock.p25, '.2f')} to "
        f"{number(clock.p75, '.2f')}",
    )
    table.add_row(
        "time per epoch",
        number(efficiency.epoch_time_s, ".0f"),
        "s",
        f"{efficiency.steps_per_epoch:.1f} steps; optimizer steps only",
    )
    table.add_row(
        "throughput",
        number(efficiency.throughput_tokens_per_s, ",.0f"),
        "tokens/s",
        "real tokens",
    )
    for phase in ("train", "evaluate", "generate"):
        table.add_row(
            f"peak memory, {phase}",
            number(getattr(memory, phase), ".2f"),
            "GiB",
            MEMORY_KINDS[memory.kind],
        )
    if memory.train_tensors is not None:
        table.add_row(
            "peak memory, tensors",
            number(memory.train_tensors, ".2f"),
            "GiB",
            "live tensors in training, counted",
        )
    for name in ("base", "unmerged", "merged"):
        table.add_row(
            f"latency, {name}",
            number(getattr(latency, name), ".1f"),
            "ms/token",
            f"first token after {number(getattr(first, name), '.0f', unit=' ms')}",
        )
    return table


def _criteria(criteria: Criteria) -> Table:
    table = _table("Success criteria", "", "", "evidence", right=())
    for field in fields(criteria):
        criterion: Criterion = getattr(criteria, field.name)
        table.add_row(field.name, _VERDICTS[criterion.passed], escape(criterion.evidence))
    return table


def _table(title: str, *columns: str, right: tuple[int, ...] = (1, 2, 3)) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(column, justify="right" if index in right and not last else "left")
    return table


def _provenance(result: RunResult) -> str:
    quality = result.quality.tuned
    lines = [f"{result.finished_at}  {result.device}", f"signature  {result.signature}"]
    lines += [
        f"{name}  {signature}"
        for name, signature in (("BLEU", quality.bleu_signature), ("chrF", quality.chrf_signature))
        if signature
    ]
    return "\n".join(lines)
