"""What the learning-rate search of a study tried, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.report.study.numbers import LOSS_DECIMALS, NOT_MEASURED, fixed
from loracle.report.study.tables import Column, Table
from loracle.study_record import StudyRecord


def search_table(study: StudyRecord) -> Table | None:
    """Returns the validation loss of every arm at every rate that was tried; None: no search."""
    if not study.search:
        return None
    losses = {(run.arm, run.learning_rate): _loss(run.result) for run in study.search}
    rates = sorted({rate for _, rate in losses})
    seed = study.search[0].seed
    edge = arms_at_the_edge(study)
    return Table(
        name="search",
        caption=f"Learning rates tried: validation loss in nats per token of a trial run with seed "
        f"{seed}, which the comparison does not use. Each arm takes the rate of its lowest loss. "
        "Edge: that rate ends the grid, and one beyond it might be better.",
        columns=(
            Column("arm", align="left"),
            *(Column(f"{rate:g}") for rate in rates),
            Column("taken"),
            Column("", align="left"),
        ),
        rows=tuple(
            (
                arm,
                *(
                    fixed(losses.get((arm, rate)), decimals=LOSS_DECIMALS)
                    if (arm, rate) in losses
                    else NOT_MEASURED
                    for rate in rates
                ),
                f"{taken:g}",
                "edge" if arm in edge else "",
            )
            for arm, taken in taken_rates(study).items()
        ),
    )


def taken_rates(study: StudyRecord) -> dict[str, float]:
    """Returns the rate of each arm that was searched: the one with the lowest validation loss."""
    found: dict[str, tuple[float, float]] = {}
    for run in study.search:
        tried = (_loss(run.result), run.learning_rate)
        found[run.arm] = min(found.get(run.arm, tried), tried)
    return {arm: rate for arm, (_, rate) in found.items()}


def arms_at_the_edge(study: StudyRecord) -> list[str]:
    """Returns the arms whose rate is the lowest or the highest of the grid."""
    grid = (study.study.get("search") or {}).get("learning_rates", [])
    ends = {min(grid), max(grid)} if grid else set()
    return [arm for arm, rate in taken_rates(study).items() if rate in ends]


def _loss(result: Mapping[str, Any]) -> float:
    loss: float = result["quality"]["tuned"]["loss_nats_per_token"]
    return loss
