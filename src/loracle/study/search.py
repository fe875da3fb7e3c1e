"""The learning-rate search of a study: trial runs of every arm, and the plan that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loracle.errors import UsageError
from loracle.study.plan import PlannedRun, StudyPlan, planned_run


def search_runs(plan: StudyPlan) -> list[PlannedRun]:
    """Returns the trial runs of the search, if the study has one.

    Full fine-tuning has none: its rate is its own, and given.
    """
    search = plan.study.search
    if search is None:
        return []
    return [
        planned_run(arm, base=plan.base, seed=search.seed, role="search", learning_rate=rate)
        for arm in plan.arms
        if not arm.plan.is_full
        for rate in search.learning_rates
    ]


def with_learning_rates(plan: StudyPlan, rates: Mapping[str, float]) -> StudyPlan:
    """Returns the plan with each arm's own learning rate, as a search found it.

    Raises:
        UsageError: If an arm has none.
    """
    arms = {arm.name: arm for arm in plan.arms}
    missing = [arm.name for arm in plan.arms if arm.name not in rates and not arm.plan.is_full]
    if missing:
        raise UsageError(f"search: no learning rate of arm '{missing[0]}' came to an end")
    runs = []
    for run in plan.runs:
        new = planned_run(
            arms[run.arm],
            base=plan.base,
            seed=run.seed,
            role=run.role,
            learning_rate=rates.get(run.arm),
        )
        suffix = run.id.partition("-repeat")
        runs.append(replace(new, id=new.id + suffix[1] + suffix[2]))
    return replace(plan, runs=tuple(runs))
