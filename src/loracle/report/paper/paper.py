"""The paper: a skeleton without a number of its own, and the macros that carry them into it."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.analysis.comparison import Comparison
from loracle.report.contents import Contents
from loracle.report.figures.vega import Figure
from loracle.report.text.answer import of_metric, with_verdict
from loracle.report.text.latex import escape, macro_name, macros_of
from loracle.report.text.numbers import (
    LOSS_DECIMALS,
    PERCENT_DECIMALS,
    count,
    fixed,
    p_value,
    signed,
    with_interval,
)
from loracle.text import plural

_METHODS = ("MethodModel", "MethodTraining", "MethodArms", "MethodMeasures", "MethodStatistics")


def paper_of(contents: Contents) -> str:
    """Returns the skeleton of a paper."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # LaTeX has its own meaning for braces, percent and hash signs.
    templates = Environment(  # noqa: S701 - LaTeX, and nothing is filled in but names of ours
        loader=PackageLoader("loracle.report.paper"),
        undefined=StrictUndefined,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    figures = contents.figures
    return templates.get_template("paper.tex.j2").render(
        has_bleu=contents.tables.bleu is not None,
        results=_panels((figures.forest, *figures.losses)),
        costs=_panels((*figures.tradeoffs, *figures.costs)),
        placements=_panels((figures.map_sheet, *figures.scores)),
    )


def _panels(figures: Sequence[Figure]) -> list[dict[str, str]]:
    return [
        {"name": figure.name, "macro": macro_name("caption", figure.name)}
        for figure in figures
        if figure.spec is not None
    ]


def macros_file(contents: Contents) -> str:
    """Returns every number and generated sentence of the paper as a LaTeX command."""
    losses = of_metric(contents.verdicts.comparisons, "loss_nats_per_token")
    values = {
        "Question": str(contents.study.study["question"]),
        "StudyName": contents.study.name,
        "StudyDate": contents.provenance.date,
        "Provenance": contents.provenance.line,
        "ReferenceArm": contents.study.reference,
        "Answer": " ".join((*contents.answer, *contents.advice[:1])),
        "Recommendation": " ".join(contents.advice),
        "NoiseFloor": " ".join(contents.noise),
        "Environment": "; ".join(f"{name}: {value}" for name, value in contents.environment) + ".",
        "NumSeeds": count(len(contents.provenance.seeds)),
        "NumExamples": count(contents.provenance.num_examples),
        "NumTargets": count(contents.provenance.num_targets),
        "NumAnswers": count(contents.provenance.num_answers),
        "NumArms": count(len(contents.study.arms)),
        "NumRuns": plural(len(contents.study.runs), "run"),
        "NumCompared": count(len(losses)),
        "NumBetter": count(len(with_verdict(losses, "better"))),
        "NumWorse": count(len(with_verdict(losses, "worse"))),
        "NumOpen": count(len(with_verdict(losses, "not distinguishable"))),
        **dict(zip(_METHODS, contents.methods, strict=True)),
        **_captions(contents.figures.on_paper()),
    }
    for comparison in losses:
        values |= _arm_values(comparison, taken=set(values))
    return macros_of(values)


def _captions(figures: Sequence[Figure]) -> dict[str, str]:
    return {
        macro_name("caption", figure.name): f"{figure.title}. {figure.caption}"
        for figure in figures
        if figure.spec is not None
    }


def _arm_values(comparison: Comparison, *, taken: set[str]) -> dict[str, str]:
    """Returns an arm's figures under names that say which, e.g. ``LossDifferenceAttentionQv``.

    Names of letters only may collide (``a-b`` and ``a_b``); the later arm's then end in Again.
    """
    arm = comparison.arm
    while macro_name("loss-difference", arm) in taken:
        arm += " again"
    low, high = comparison.interval or (None, None)
    values = {
        "loss-difference": with_interval(comparison.difference, low, high, decimals=LOSS_DECIMALS),
        "perplexity-change": signed(comparison.effect_percent, decimals=PERCENT_DECIMALS),
        "p-holm": p_value(comparison.p_holm),
        "verdict": comparison.verdict,
        "smallest-effect": fixed(comparison.smallest_effect, decimals=LOSS_DECIMALS),
    }
    return {macro_name(what, arm): value for what, value in values.items()}


def limits_file(contents: Contents) -> str:
    """Returns what the study cannot show as a LaTeX list."""
    items = [f"\\item {escape(sentence)}" for sentence in contents.limits]
    return "\n".join(["\\begin{itemize}", *items, "\\end{itemize}"]) + "\n"
