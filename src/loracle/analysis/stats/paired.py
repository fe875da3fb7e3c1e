"""The token-weighted difference of two arms' losses, over seeds and examples at once.

Shape legend: S seeds, E examples; ``...`` stands for independent studies.

Both arms ran with the same seeds on the same examples, so the difference is taken per seed and
example: D_se = NLL_ours - NLL_theirs, in nats summed over the n_e tokens of example e. The estimate

    theta = sum D_se / (S sum n_e)

is a ratio whose denominator varies with the examples drawn; to first order its error is the mean of
x_se = (D_se - n_e theta) / mean(n) (linearisation; Cochran 1977, Sampling Techniques, chapter 6).
For x a two-way crossed model without replication holds: an effect of the seed, one of the example,
and what is left. The mean squares of an analysis of variance estimate what each contributes to
the variance of the estimate (Searle, Casella, McCulloch 1992, Variance Components):

    seeds       MS_seed / (S E)                    S - 1 degrees of freedom
    examples    max(MS_example - MS_residual, 0) / (S E)      E - 1

MS_seed already holds the residual, so it is taken out of the other. A negative variance component
of the examples is none. The part of the seeds is never reduced to that of the residual when it
happens to come out smaller: that MS_seed < MS_residual with two degrees of freedom is chance, and
taking the variance of the seeds for zero then would cover less than it says when it is not. So the
variance is never below the one of seeds alone, and an interval is, rarely, narrower than over
examples alone would be; over many studies it covers what it says (`difference`).

Coverage of the 95% interval in simulated studies (tests/stats/test_paired.py): 94.5% to 97% over
3 and 5 seeds, 100 and 200 examples, no, little and dominant variance between seeds, and
differences that go with an example's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loracle.analysis.stats.difference import ALPHA, Difference, difference_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """An estimate and the parts of its variance due to seeds and examples."""

    estimate: Floats
    """Nats per token, of shape (...)."""
    seed_variance: Floats
    """Of shape (...); NaN with one seed."""
    example_variance: Floats
    """Of shape (...); NaN with one seed or one example."""


def paired_difference(
    a: ArrayLike, b: ArrayLike, weights: ArrayLike, *, coverage: float = 1 - ALPHA
) -> Difference:
    """Returns the difference in loss, nats per token, over the population of seeds and examples.

    Args:
        a: NLL in nats, summed over the tokens of an example: (S, E).
        b: NLL of the other arm on the same seeds and examples; (1, E) for a model without seeds.
        weights: Target tokens of each example: (E,).
        coverage: Probability that the interval holds the true difference.
    """
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    tokens = np.asarray(weights, dtype=np.float64)
    num_seeds, num_examples = differences.shape
    assert tokens.shape == (num_examples,), "one weight per example"
    parts = variance_parts(differences, tokens)
    return difference_of(
        float(parts.estimate),
        seed_variance=float(parts.seed_variance),
        example_variance=float(parts.example_variance),
        num_seeds=num_seeds,
        num_examples=num_examples,
        coverage=coverage,
    )


def variance_parts(differences: Floats, weights: Floats) -> Parts:
    """Returns estimate and variance parts of D_se (..., S, E) with weights n_e (..., E)."""
    num_seeds, num_examples = differences.shape[-2:]
    theta = differences.sum((-2, -1)) / (num_seeds * weights.sum(-1))
    expected = weights * theta[..., None]
    mean_weight = weights.mean(-1)[..., None, None]
    x = (differences - expected[..., None, :]) / mean_weight
    of_seeds, of_examples = x.mean(-1), x.mean(-2)
    residual = x - of_seeds[..., None] - of_examples[..., None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        ms_seed = num_examples * (of_seeds**2).sum(-1) / np.float64(num_seeds - 1)
        ms_example = num_seeds * (of_examples**2).sum(-1) / np.float64(num_examples - 1)
        ms_residual = (residual**2).sum((-2, -1)) / np.float64((num_seeds - 1) * (num_examples - 1))
    cells = num_seeds * num_examples
    return Parts(
        estimate=theta,
        seed_variance=ms_seed / cells,
        example_variance=np.maximum(ms_example - ms_residual, 0) / cells,
    )
