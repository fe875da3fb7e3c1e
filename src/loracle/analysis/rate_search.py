"""The learning rate that each arm of a search took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loracle.records.study_folder import StudyRecord


def taken_rates(study: StudyRecord) -> dict[str, float]:
    """Returns the rate of each arm that was searched: the one with the lowest validation loss."""
    return best_rates((run.arm, run.learning_rate, final_loss(run.result)) for run in study.search)


def best_rates(trials: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Returns the rate with the lowest loss of each arm, from (arm, rate, loss) of its trials."""
    best: dict[str, tuple[float, float]] = {}
    for arm, rate, loss in trials:
        best[arm] = min(best.get(arm, (loss, rate)), (loss, rate))
    return {arm: rate for arm, (_, rate) in best.items()}


def arms_at_the_edge(study: StudyRecord) -> list[str]:
    """Returns the arms whose rate is the lowest or the highest of the grid."""
    grid = (study.study.get("search") or {}).get("learning_rates", [])
    ends = {min(grid), max(grid)} if grid else set()
    return [arm for arm, rate in taken_rates(study).items() if rate in ends]


def final_loss(result: Mapping[str, Any]) -> float:
    """Returns the validation loss of the tuned model, in nats per token."""
    loss: float = result["quality"]["tuned"]["loss_nats_per_token"]
    return loss
