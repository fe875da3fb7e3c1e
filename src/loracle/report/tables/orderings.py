"""What others found, beside what this study found, and why the two may differ."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.analysis.orderings import Ordering
from loracle.report.tables.table import Column, Table


def orderings_table(orderings: Sequence[Ordering]) -> Table:
    """Returns the published orderings with their outcome here."""
    return Table(
        name="orderings",
        caption="Two arms are compared directly, on the seeds that both completed; Holm corrects "
        "over the comparisons of one ordering.",
        columns=(
            Column("", align="left"),
            Column("published", align="left", share=0.25),
            Column("here", align="left", share=0.13),
            Column("evidence", align="left", share=0.32),
            Column("source", align="left", share=0.2),
        ),
        rows=tuple(
            (found.id, found.claim, found.outcome, found.evidence, found.source)
            for found in orderings
        ),
    )
