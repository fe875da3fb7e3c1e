"""The result of one run as a table on the terminal."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loracle.records.result import (
    MEMORY_KINDS,
    Criteria,
    Criterion,
    Efficiency,
    Quality,
    RunResult,
    perplexity_of,
)
from loracle.report.text.numbers import NOT_MEASURED, count, fixed, percent, signed
from loracle.text import perplexity_words

_VERDICTS = {True: ("passed", "green"), False: ("failed", "red"), None: ("not judged", "yellow")}


def result_view(result: RunResult) -> RenderableType:
    """Returns quality, cost and the four success criteria of one run."""
    return Group(
        Padding(_quality(result.quality), (1, 0, 0, 0)),
        Padding(_efficiency(result.efficiency), (1, 0, 0, 0)),
        Padding(_criteria(result.criteria), (1, 0, 0, 0)),
        *(Padding(Text(f"warning: {line}"), (1, 0, 0, 0)) for line in result.data_warnings),
        Padding(Text(_provenance(result), style="dim"), (1, 0)),
    )


def _quality(quality: Quality) -> Table:
    base, tuned = quality.base, quality.tuned
    table = _table("Quality", "", "untuned", "tuned", "change", "measured on")
    held_out = f"{tuned.num_examples:,} examples, {tuned.num_targets:,} tokens"
    answers = NOT_MEASURED if tuned.num_answers is None else f"{tuned.num_answers:,} greedy answers"
    losses = base.loss_nats_per_token, tuned.loss_nats_per_token
    ratio = perplexity_of(losses[1] - losses[0])
    change = percent(None if ratio is None else ratio - 1, sign=True)
    perplexities = map(perplexity_words, (base.perplexity, tuned.perplexity))
    table.add_row("perplexity", *perplexities, change, held_out)
    change = signed(losses[1] - losses[0], decimals=4)
    table.add_row("loss, nats per token", *_fixed(*losses, decimals=4), change, held_out)
    for name, before, after in (("BLEU", base.bleu, tuned.bleu), ("chrF", base.chrf, tuned.chrf)):
        change = "" if before is None or after is None else signed(after - before, decimals=2)
        table.add_row(name, *_fixed(before, after, decimals=2), change, answers)
    cut = (percent(model.hit_limit_frac, decimals=0) for model in (base, tuned))
    table.add_row("answers cut at the limit", *cut, "", answers)
    return table


def _fixed(*values: float | None, decimals: int) -> list[str]:
    return [fixed(value, decimals=decimals) for value in values]


def _efficiency(efficiency: Efficiency) -> Table:
    clock, memory = efficiency.step_time_s, efficiency.peak_memory_gib
    table = _table("Cost", "", "value", "", "note")
    full = efficiency.full_finetune_params
    share = percent(efficiency.trainable_params / full, decimals=2)
    median, p25, p75 = _fixed(clock.median, clock.p25, clock.p75, decimals=2)
    rows = [
        (
            "trainable parameters",
            count(efficiency.trainable_params),
            "",
            f"{share} of the {count(full)} of full fine-tuning",
        ),
        (
            "time per step",
            median,
            "s",
            f"median of {clock.num_steps}; quartiles {p25} to {p75}",
        ),
        (
            "time per epoch",
            count(efficiency.epoch_time_s),
            "s",
            f"{efficiency.steps_per_epoch:.1f} steps; optimizer steps only",
        ),
        ("throughput", count(efficiency.throughput_tokens_per_s), "tokens/s", "real tokens"),
    ]
    for phase in ("train", "evaluate", "generate"):
        peak = fixed(getattr(memory, phase), decimals=2)
        rows.append(
            (f"peak memory, {phase}", peak, "GiB", MEMORY_KINDS.get(memory.kind, memory.kind))
        )
    if memory.train_tensors is not None:
        peak = fixed(memory.train_tensors, decimals=2)
        rows.append(("peak memory, tensors", peak, "GiB", "live tensors in training, counted"))
    for state in ("base", "unmerged", "merged"):
        per_token = fixed(getattr(efficiency.latency_ms_per_token, state), decimals=1)
        first = getattr(efficiency.latency_first_token_ms, state)
        after = NOT_MEASURED if first is None else f"{count(first)} ms"
        rows.append((f"latency, {state}", per_token, "ms/token", f"first token after {after}"))
    for row in rows:
        table.add_row(*row)
    return table


def _criteria(criteria: Criteria) -> Table:
    table = _table("Success criteria", "", "", "evidence", right=())
    for field in fields(criteria):
        criterion: Criterion = getattr(criteria, field.name)
        table.add_row(field.name, Text(*_VERDICTS[criterion.passed]), Text(criterion.evidence))
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
