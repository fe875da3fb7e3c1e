"""The learning rate of each arm, and whether the arms' rates allow a comparison of places."""

from __future__ import annotations

from dataclasses import dataclass

from loracle.records.study_folder import StudyRecord


@dataclass(frozen=True)
class SharedRate:
    """One learning rate for arms of unequal rank, none of them searched."""

    learning_rate: float
    """Peak learning rate of every arm with adapters."""
    lowest_rank: int
    highest_rank: int


def shared_rate(study: StudyRecord) -> SharedRate | None:
    """Returns the rate that arms of unequal rank share without a search; None: no such rate.

    Such a study compares arms at that rate and not places: with alpha / r held, a step moves a
    module's weights by an amount that grows with the rank, and with alpha held it does not, so one
    rate is near the best of some arms only.
    """
    if study.study.get("search"):
        return None
    adapted = [arm for arm in study.arms if arm.rank is not None and study.runs_of(arm.name)]
    rates = {run.learning_rate for arm in adapted for run in study.runs_of(arm.name).values()}
    ranks = {arm.name: {module["rank"] for module in arm.modules} for arm in adapted}
    if len(rates) != 1 or len({frozenset(each) for each in ranks.values()}) == 1:
        return None
    every = set().union(*ranks.values())
    return SharedRate(rates.pop(), min(every), max(every))


def taken_rates(study: StudyRecord) -> dict[str, float]:
    """Returns the rate of each arm that was searched: the one with the lowest validation loss."""
    found: dict[str, tuple[float, float]] = {}
    for run in study.search:
        tried = (run.result.quality.tuned.loss_nats_per_token, run.learning_rate)
        found[run.arm] = min(found.get(run.arm, tried), tried)
    return {arm: rate for arm, (_, rate) in found.items()}


def arms_at_the_edge(study: StudyRecord) -> list[str]:
    """Returns the arms whose rate is the lowest or the highest of the grid."""
    grid = (study.study.get("search") or {}).get("learning_rates", [])
    ends = {min(grid), max(grid)} if grid else set()
    return [arm for arm, rate in taken_rates(study).items() if rate in ends]
