"""The tables of a study: verdicts, the untuned model, costs."""

from __future__ import annotations

import math
from dataclasses import replace

from loracle.analysis.comparison import UNTUNED, Comparison
from loracle.analysis.costs import AXES, Axis, costs_of
from loracle.analysis.summaries import Summary
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import ArmRecord, StudyRecord
from loracle.report.tables.table import Column, Table
from loracle.report.text.answer import at_one_rate
from loracle.report.text.costs import how_clocked, how_measured, memory_kind
from loracle.report.text.numbers import (
    BLEU_DECIMALS,
    LOSS_DECIMALS,
    NOT_MEASURED,
    PERCENT_DECIMALS,
    count,
    decimals_for,
    fixed,
    interval_words,
    p_value,
    percent,
    signed,
    with_interval,
)

_MARKS = {"better": "better", "worse": "worse", "not distinguishable": "open"}
_ARM = Column("arm", align="left")


def arms_by_effect(study: StudyRecord, verdicts: Verdicts) -> list[ArmRecord]:
    """Returns the arms from lowest to highest loss; those that did not run come last."""

    def effect(arm: ArmRecord) -> float:
        if arm.name == verdicts.reference:
            return 0.0
        comparison = verdicts.comparison(arm.name)
        difference = comparison.difference if comparison else None
        return math.inf if difference is None else difference

    return sorted(study.arms, key=effect)


def verdict_table(study: StudyRecord, verdicts: Verdicts, *, provenance: str) -> Table:
    """Returns every arm beside the reference, sorted by effect."""
    arms, level = arms_by_effect(study, verdicts), interval_words(verdicts.coverage)
    step, memory = _cells(study, "step_time_s"), _cells(study, "peak_memory_gib")
    rows = [
        (
            *_verdict_cells(arm, verdicts),
            step.get(arm.name, NOT_MEASURED),
            memory.get(arm.name, NOT_MEASURED),
        )
        for arm in arms
    ]
    return Table(
        name="verdicts",
        caption=f"{_how_to_read(study, verdicts)} {_measured_on(study)} {provenance}.",
        columns=(
            _ARM,
            Column("rank"),
            Column("trainable parameters", "gap to the budget"),
            Column("seeds", "paired"),
            Column("loss difference", f"nats per token [{level}]"),
            Column("perplexity", "change in %"),
            Column("p", "Holm"),
            Column("verdict", align="left"),
            Column("BLEU difference", f"points [{level}]"),
            Column("step time", "s"),
            Column("peak memory", "GiB"),
        ),
        rows=tuple(rows),
        marks=tuple(_mark(arm.name, verdicts) for arm in arms),
    )


def _verdict_cells(arm: ArmRecord, verdicts: Verdicts) -> tuple[str, ...]:
    params = count(arm.trainable_params)
    if arm.budget_gap_frac is not None:
        params += f" ({percent(arm.budget_gap_frac, sign=True)})"
    rank = "full" if arm.rank is None else str(arm.rank)
    if arm.name == verdicts.reference:
        summary = verdicts.summary(arm.name)
        seeds = summary.loss_nats_per_token if summary else None
        n = str(seeds.n) if seeds else "0"
        bleu_cell = "0" if verdicts.num_answers else NOT_MEASURED
        return (arm.name, rank, params, n, "0", "0", "", "reference", bleu_cell)
    loss = verdicts.comparison(arm.name)
    bleu = verdicts.comparison(arm.name, metric="bleu")
    return (
        arm.name,
        rank,
        params,
        str(loss.num_seeds if loss else 0),
        _difference(loss, decimals=LOSS_DECIMALS),
        signed(loss.effect_percent if loss else None, decimals=PERCENT_DECIMALS),
        p_value(loss.p_holm if loss else None),
        _verdict(loss),
        _difference(bleu, decimals=BLEU_DECIMALS),
    )


def _verdict(comparison: Comparison | None) -> str:
    if comparison is None or comparison.measured is None:
        return "not run"
    return comparison.verdict if comparison.interval else "no interval"


def _difference(comparison: Comparison | None, *, decimals: int) -> str:
    if comparison is None:
        return NOT_MEASURED
    low, high = comparison.interval or (None, None)
    return with_interval(comparison.difference, low, high, decimals=decimals)


def _mark(arm: str, verdicts: Verdicts) -> str:
    if arm == verdicts.reference:
        return "reference"
    comparison = verdicts.comparison(arm)
    return _MARKS[comparison.verdict] if comparison and comparison.interval else ""


def effects_table(
    table: Table, study: StudyRecord, verdicts: Verdicts, *, provenance: str
) -> Table:
    """Returns the verdict table without BLEU and costs, to fit the width of a page."""
    shown = ("arm", "rank", "trainable parameters", "loss difference", "perplexity", "p", "verdict")
    narrow = table.only(*shown, name="effects")
    return replace(narrow, caption=f"{_how_to_read(study, verdicts)} {provenance}.")


def _how_to_read(study: StudyRecord, verdicts: Verdicts) -> str:
    return (
        f"Arm minus {verdicts.reference}, sorted by loss; a negative loss difference is an "
        f"improvement. Intervals hold over seeds and examples and are not corrected for the number "
        f"of arms; p is.{at_one_rate(study)}"
    )


def _measured_on(study: StudyRecord) -> str:
    return (
        f"{how_clocked(study)} Memory ({memory_kind(study.runs)}): median over runs, measured on "
        f"{how_measured(study.runs)}."
    )


def bleu_table(study: StudyRecord, verdicts: Verdicts, *, provenance: str) -> Table:
    """Returns BLEU and its differences, for the paper."""
    rows = []
    for arm in arms_by_effect(study, verdicts):
        summary = verdicts.summary(arm.name)
        comparison = verdicts.comparison(arm.name, metric="bleu")
        is_reference = arm.name == verdicts.reference
        rows.append(
            (
                arm.name,
                _mean_and_sd(summary.bleu if summary else None, decimals=BLEU_DECIMALS),
                "0" if is_reference else _difference(comparison, decimals=BLEU_DECIMALS),
                "" if is_reference else p_value(comparison.p_holm if comparison else None),
                "reference" if is_reference else _verdict(comparison),
            )
        )
    return Table(
        name="bleu",
        caption=f"BLEU over {verdicts.num_answers:,} greedy answers, mean and standard deviation "
        f"between seeds; differences from {verdicts.reference}.{at_one_rate(study)} {provenance}.",
        columns=(
            _ARM,
            Column("BLEU", "mean (SD)"),
            Column("difference", f"points [{interval_words(verdicts.coverage)}]"),
            Column("p", "Holm"),
            Column("verdict", align="left"),
        ),
        rows=tuple(rows),
    )


def untuned_table(study: StudyRecord, verdicts: Verdicts, *, provenance: str) -> Table:
    """Returns every arm's metrics beside those of the untuned model."""
    base = verdicts.untuned
    rows = [
        (
            "untuned",
            _mean_and_sd(base.loss_nats_per_token, decimals=LOSS_DECIMALS),
            _mean_and_sd(base.perplexity, decimals=3),
            _mean_and_sd(base.bleu, decimals=BLEU_DECIMALS),
            "0",
            "",
        )
    ]
    for arm in arms_by_effect(study, verdicts):
        summary = verdicts.summary(arm.name)
        comparison = verdicts.against_untuned(arm.name)
        rows.append(
            (
                arm.name,
                _mean_and_sd(
                    summary.loss_nats_per_token if summary else None, decimals=LOSS_DECIMALS
                ),
                _mean_and_sd(summary.perplexity if summary else None, decimals=3),
                _mean_and_sd(summary.bleu if summary else None, decimals=BLEU_DECIMALS),
                _difference(comparison, decimals=LOSS_DECIMALS),
                _verdict(comparison),
            )
        )
    return Table(
        name="untuned",
        caption=f"Each arm beside the {UNTUNED} model, on the validation set: "
        f"mean over seeds, in brackets their standard deviation. {provenance}.",
        columns=(
            _ARM,
            Column("loss", "nats per token"),
            Column("perplexity"),
            Column("BLEU"),
            Column("loss minus untuned", f"nats per token [{interval_words(verdicts.coverage)}]"),
            Column("verdict", align="left"),
        ),
        rows=tuple(rows),
        marks=("reference", *("" for _ in rows[1:])),
    )


def _mean_and_sd(summary: Summary | None, *, decimals: int) -> str:
    if summary is None:
        return NOT_MEASURED
    mean = fixed(summary.mean, decimals=decimals)
    return mean if summary.sd is None else f"{mean} ({fixed(summary.sd, decimals=decimals)})"


def cost_table(study: StudyRecord, *, provenance: str) -> Table:
    """Returns every arm's costs: median over runs, and lowest to highest."""
    shown: tuple[Axis, ...] = tuple(axis for axis in AXES if axis != "trainable_params")
    cells = {axis: _cells(study, axis, with_range=True) for axis in shown}
    return Table(
        name="costs",
        caption=f"Median over an arm's runs; in brackets lowest to highest run: "
        f"batches differ between seeds, and are the same for all arms of a seed. "
        f"{how_clocked(study)} Memory: {memory_kind(study.runs)}; measured on "
        f"{how_measured(study.runs)}. {provenance}.",
        columns=(
            _ARM,
            Column("trainable parameters"),
            *(Column(*AXES[axis]) for axis in shown),
        ),
        rows=tuple(
            (
                arm.name,
                count(arm.trainable_params),
                *(cells[axis].get(arm.name, NOT_MEASURED) for axis in shown),
            )
            for arm in study.arms
        ),
        marks=tuple("reference" if arm.name == study.reference else "" for arm in study.arms),
    )


def _cells(study: StudyRecord, axis: Axis, *, with_range: bool = False) -> dict[str, str]:
    """Returns each arm's median cost, and lowest to highest run."""
    costs = costs_of(study, axis)
    decimals = decimals_for(cost.median for cost in costs.values())
    cells = {}
    for arm, cost in costs.items():
        median, low, high = (
            fixed(v, decimals=decimals) for v in (cost.median, cost.low, cost.high)
        )
        has_range = with_range and low != high
        cells[arm] = f"{median} [{low} to {high}]" if has_range else median
    return cells
