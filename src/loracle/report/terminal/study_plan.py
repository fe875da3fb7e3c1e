"""A study's plan on the terminal, before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.errors import UsageError
from loracle.report.terminal.table import add_numbers, borderless
from loracle.study.forecast import TimeEstimate, estimate_time
from loracle.study.plan import PlannedArm, StudyPlan
from loracle.study.search import search_runs
from loracle.text import in_words, plural


def plan_view(
    plan: StudyPlan, *, maps: bool = True, time: TimeEstimate | str | None = None
) -> RenderableType:
    """Returns the plan for the terminal: arms with ranks and counts, runs, and predicted time.

    ``maps`` adds the layers x modules map of every arm. ``time`` may be a reason why it is unknown.
    """
    from loracle.report.terminal.placement_map import placement_map

    seconds = time.seconds_by_arm if isinstance(time, TimeEstimate) else {}
    table = _arms_table(plan.arms, seconds=seconds)
    parts: list[RenderableType] = [_heading(plan), table, _runs_line(plan)]
    if time is not None:
        parts.append(Text(f"time: {time.words() if isinstance(time, TimeEstimate) else time}"))
    if maps:
        for arm in (arm for arm in plan.arms if not arm.plan.is_full):
            parts += [Text(f"\n{arm.name}", style="bold"), placement_map(arm.plan, plan.inventory)]
    return Group(*parts)


def time_of(plan: StudyPlan, *, out: Path) -> TimeEstimate | str:
    """Returns how long the study will take, or why it is unknown."""
    try:
        return estimate_time(plan, out=out)
    except UsageError as error:
        return f"not known: {error}"


def _heading(plan: StudyPlan) -> Text:
    return Text.assemble(
        (plan.name, "bold"),
        f": {plan.study.question}\n",
        f"{plan.base.model} on {plan.base.data.source}, {plan.base.train.max_steps} steps of "
        f"{plan.base.train.batch_size} examples; {plan.study.budget}, "
        f"compared with {plan.study.reference}",
    )


def _arms_table(arms: Sequence[PlannedArm], *, seconds: Mapping[str, float]) -> Table:
    table = borderless(gap=2)
    table.add_column("arm", no_wrap=True)
    add_numbers(table, "modules", "rank", "alpha", "trainable\nparams", "gap to the\nbudget")
    if seconds:
        add_numbers(table, "time of\na run")
    for arm in arms:
        gap = arm.budget_gap_frac
        table.add_row(
            arm.name,
            "all" if arm.plan.is_full else f"{len(arm.plan.modules):,}",
            "n/a" if arm.plan.is_full else str(arm.rank),
            "n/a" if arm.plan.is_full else f"{arm.alpha:g}",
            f"{arm.plan.trainable_params:,}",
            "n/a" if gap is None else f"{100 * gap:+.2f} %",
            *([in_words(seconds[arm.name])] if seconds else []),
        )
    return table


def _runs_line(plan: StudyPlan) -> Text:
    trials = search_runs(plan)
    parts = [f"{len(plan.arms)} arms x {len(plan.study.seeds)} seeds"]
    noise = plan.study.noise
    if noise.repeats or noise.extra_seeds:
        parts.append(
            f"{plural(noise.repeats, 'repeat')} and "
            f"{plural(len(noise.extra_seeds), 'extra seed')} of {plan.study.reference} for the "
            "noise floor"
        )
    if trials:
        parts.append(f"{plural(len(trials), 'trial run')} to find learning rates")
    count = len(plan.runs) + len(trials)
    return Text(f"\n{count} runs: {', '.join(parts)}")
