"""A study's verdicts on the terminal: one line per arm, the largest gain first."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.analysis.comparison import Comparison
from loracle.analysis.costs import Axis, arm_costs
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import ArmRecord, StudyRecord
from loracle.report.terminal.table import borderless
from loracle.report.text.answer import answer
from loracle.report.text.numbers import LOSS_DECIMALS, fixed, interval, p_value, signed
from loracle.text import plural

_STYLES = {"better": "green", "worse": "red", "not distinguishable": "yellow"}


# Narrower than this, a terminal shows the columns that answer the question and no others.
_WIDE_COLUMNS = 120


def verdict_view(study: StudyRecord, verdicts: Verdicts, *, width: int) -> RenderableType:
    """Returns the verdict table, what it says in words, and what it rests on.

    Args:
        study: The study.
        verdicts: What was found in it.
        width: Of the terminal, in characters.
    """
    return Group(
        Text(str(study.study["question"]), style="bold"),
        _table(study, verdicts, wide=width >= _WIDE_COLUMNS),
        Text(" ".join(answer(study, verdicts))),
        Text(_basis(study, verdicts), style="dim"),
    )


def _table(study: StudyRecord, verdicts: Verdicts, *, wide: bool) -> Table:
    table = borderless()
    table.add_column("arm", overflow="fold")
    level = f"{100 * verdicts.coverage:g}% interval"
    costs = ("r", "parameters", "s per\nstep", "GiB") if wide else ()
    for header in (*costs, "perplexity", "difference,\nnats/token", level):
        table.add_column(header, justify="right", no_wrap=True)
    if wide:
        table.add_column("p (Holm)", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for arm in sorted(study.arms, key=lambda arm: _place(arm, verdicts)):
        table.add_row(*_cells(study, verdicts, arm, wide=wide))
    return table


def _place(arm: ArmRecord, verdicts: Verdicts) -> float:
    """Orders arms by their loss; those without a completed run come last."""
    summary = verdicts.summary(arm.name)
    loss = summary and summary.loss_nats_per_token
    return loss.mean if loss else float("inf")


def _cells(
    study: StudyRecord, verdicts: Verdicts, arm: ArmRecord, *, wide: bool
) -> list[str | Text]:
    summary, found = verdicts.summary(arm.name), verdicts.comparison(arm.name)
    perplexity = summary and summary.perplexity
    low, high = (found.interval if found else None) or (None, None)
    costs = [
        str(arm.rank or "n/a"),
        f"{arm.trainable_params:,}",
        _cost(study, arm, "step_time_s"),
        _cost(study, arm, "peak_memory_gib"),
    ]
    p = [p_value(found.p_holm) if found else ""]
    return [
        arm.name,
        *(costs if wide else []),
        fixed(perplexity.mean if perplexity else None, decimals=3),
        signed(found.difference, decimals=LOSS_DECIMALS) if found else "",
        interval(low, high, decimals=LOSS_DECIMALS) if found else "",
        *(p if wide else []),
        _verdict(arm, verdicts, found),
    ]


def _cost(study: StudyRecord, arm: ArmRecord, axis: Axis) -> str:
    cost = arm_costs(study, arm.name).get(axis)
    return fixed(cost.median if cost else None, decimals=2)


def _verdict(arm: ArmRecord, verdicts: Verdicts, found: Comparison | None) -> Text:
    if arm.name == verdicts.reference:
        return Text("reference", style="dim")
    if found is None or found.interval is None:
        return Text("n/a", style="dim")
    return Text(found.verdict, style=_STYLES[found.verdict])


def _basis(study: StudyRecord, verdicts: Verdicts) -> str:
    noise = verdicts.noise["loss_nats_per_token"].floor
    floor = "not measured" if noise is None else f"{noise:.1g} nats per token"
    missing = len(study.unfinished)
    left = f"; {plural(missing, 'run')} did not complete" if missing else ""
    return (
        f"n: {plural(len(verdicts.seeds), 'seed')}, {verdicts.num_examples} examples, "
        f"{verdicts.num_tokens:,} tokens; noise floor: {floor}{left}"
    )
