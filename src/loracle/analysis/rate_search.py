"""The learning rate that each arm of a search took."""

from __future__ import annotations

from loracle.records.study_folder import StudyRecord


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
