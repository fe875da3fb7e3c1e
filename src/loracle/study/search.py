"""The learning-rate search of a study: trial runs of every arm, and the resulting plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loracle.errors import UsageError
from loracle.study.plan import PlannedRun, StudyPlan, planned_run


def search_runs(plan: StudyPlan) -> list[PlannedRun]:
    """Returns the trial runs of the search, if the study has one.

    Full fine-tuning is not searched: the study states its rate.
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
    """Returns the plan with each arm's learning rate from the search.

    Raises:
        UsageError: If no trial run of an arm completed.
    """
    arms = {arm.name: arm for arm in plan.arms}
    missing = [arm.name for arm in plan.arms if arm.name not in rates and not arm.plan.is_full]
    if missing:
        raise UsageError(f"search: no learning rate of arm '{missing[0]}' completed")
    runs = []
    for run in plan.runs:
        new = planned_run(
            arms[run.arm],
            base=plan.base,
            seed=run.seed,
            role=run.role,
            learning_rate=rates.get(run.arm),
        )
        _, *suffix = run.id.partition("-repeat")
        runs.append(replace(new, id="".join((new.id, *suffix))))
    return replace(plan, runs=tuple(runs))
