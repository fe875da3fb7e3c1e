"""The learning-rate search of a study: rates tried and taken."""

from __future__ import annotations

from loracle.analysis.rate_search import arms_at_the_edge, taken_rates
from loracle.records.study_folder import StudyRecord
from loracle.report.tables.table import Column, Table
from loracle.report.text.numbers import LOSS_DECIMALS, fixed


def search_table(study: StudyRecord) -> Table | None:
    """Returns the validation loss of every arm at every rate tried; None: no search."""
    if not study.search:
        return None
    losses = {
        (run.arm, run.learning_rate): run.result.quality.tuned.loss_nats_per_token
        for run in study.search
    }
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
                *(fixed(losses.get((arm, rate)), decimals=LOSS_DECIMALS) for rate in rates),
                f"{taken:g}",
                "edge" if arm in edge else "",
            )
            for arm, taken in taken_rates(study).items()
        ),
    )
