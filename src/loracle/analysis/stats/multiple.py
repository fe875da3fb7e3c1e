"""Correction of p-values for the number of comparisons."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns Holm's adjusted p-values, in the order of the input.

    Adjusted values below alpha are those that Holm's step-down test rejects at alpha; whatever the
    dependence between the comparisons, the chance of one false rejection among them is at most
    alpha. Never less powerful than Bonferroni.

    None stands for a comparison that was not made and does not count.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
    """
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        adjusted[place] = largest
    return adjusted
