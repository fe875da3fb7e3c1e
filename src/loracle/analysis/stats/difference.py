"""A difference between two arms with an interval over seeds and examples.

The variance of the estimate has two parts. What the seeds contribute is known from few of them
(two degrees of freedom with three seeds), what the examples contribute from many. The critical
value for the sum lies between Student's t of the one and of the other.

Welch's and Satterthwaite's degrees of freedom put it too low when the seeds contribute most but not
all: an interval that is said to hold 95% then holds 92% with three seeds, because the variance is
at times taken to be the examples' alone. Cochran's average of the two critical values, weighted by
their shares of the variance, never holds less than 95%, but up to 97.1%. We take his with the
share to the power 1.2.

Probability that the interval misses, in percent, by the share of the true variance that the seeds
contribute, with three seeds, where the examples' part is known (closed form, tests/stats):

==================  ====  ====  ====  ====  ====  ====  ====  ====
share of the seeds     0   0.2   0.4   0.6   0.8   0.9  0.95     1
Satterthwaite        5.0   5.0   5.5   6.4   7.6   7.8   7.5   5.0
Cochran              5.0   3.0   2.9   3.3   4.1   4.6   4.9   5.0
here                 5.0   3.5   3.4   3.9   4.6   5.1   5.2   5.0
==================  ====  ====  ====  ====  ====  ====  ====  ====

With five seeds it is 3.9 to 5.0, with two 2.8 to 6.9. At the strictest level of Holm over eight
comparisons, 0.625%, it is at most 1.0% with three seeds (Satterthwaite 2.9%, Cochran 0.8%).

Source: Cochran 1964, Biometrics 20:191; Satterthwaite 1946, Biometrics Bulletin 2:110.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALPHA = 0.05
"""Chance of a false "better" or "worse" that a study allows itself."""
_POWER = 0.8
# measured (tests/stats/test_difference.py): with three seeds or more no interval holds less than
# 94.5% or more than 97%; 1 is Cochran's, up to 97.1%.
_SHARE_POWER = 1.2
# Below it a p-value says no more; quantiles of Student's t beyond it are not computed reliably.
_SMALLEST_TAIL = 1e-30


@dataclass(frozen=True)
class Difference:
    """A mean difference between two arms, and its uncertainty."""

    estimate: float
    """Nats per token, or BLEU points."""
    standard_error: float | None
    """Over the population of seeds and of examples; None with one seed or one example."""
    degrees_of_freedom: float | None
    """Of the Student's t with the interval's critical value; None: no interval, or no variance."""
    low: float | None
    """Lower end of the interval."""
    high: float | None
    p_value: float | None
    """Two-sided; None without an interval."""
    num_seeds: int
    """Seeds that both arms have."""
    num_examples: int
    """Examples that both arms were measured on."""
    seed_share: float | None
    """Share of the variance due to the seeds, residual included; the rest is the examples'."""
    coverage: float = 1 - ALPHA
    """Probability that the interval holds the true difference."""

    def smallest_effect_at(self, alpha: float) -> float | None:
        """Returns the difference found with a power of 80% by a two-sided test at ``alpha``.

        (critical value + t quantile of the power) x estimated standard error: a statement about the
        design, not about the result. None without noise, as between identical arms.
        """
        if not self.standard_error or self.seed_share is None:
            return None
        critical_at = _critical_at(
            self.seed_share, num_seeds=self.num_seeds, num_examples=self.num_examples
        )
        return (critical_at(alpha / 2) + critical_at(1 - _POWER)) * self.standard_error


def difference_of(
    estimate: float,
    *,
    seed_variance: float,
    example_variance: float,
    num_seeds: int,
    num_examples: int,
    coverage: float = 1 - ALPHA,
) -> Difference:
    """Returns a difference with its interval.

    With one seed there is no interval: examples alone say nothing about the next seed. One part of
    the estimate's variance is known from ``num_seeds`` seeds, the other from ``num_examples``.
    """
    bare = Difference(
        estimate=estimate,
        standard_error=None,
        degrees_of_freedom=None,
        low=None,
        high=None,
        p_value=None,
        num_seeds=num_seeds,
        num_examples=num_examples,
        seed_share=None,
        coverage=coverage,
    )
    if num_seeds < 2 or num_examples < 2:
        return bare
    variance = seed_variance + example_variance
    if variance == 0:  # as between identical arms
        p_value = 1.0 if estimate == 0 else 2 * _SMALLEST_TAIL
        return replace(bare, standard_error=0.0, low=estimate, high=estimate, p_value=p_value)
    error, share = math.sqrt(variance), seed_variance / variance
    critical_at = _critical_at(share, num_seeds=num_seeds, num_examples=num_examples)
    tail = (1 - coverage) / 2
    critical = critical_at(tail)
    return replace(
        bare,
        standard_error=error,
        degrees_of_freedom=_matching_df(
            critical, tail=tail, within=(num_seeds - 1, num_examples - 1)
        ),
        low=estimate - critical * error,
        high=estimate + critical * error,
        p_value=_p_value(abs(estimate) / error, critical_at=critical_at),
        seed_share=share,
    )


def critical_value(
    tail: float, *, seed_share: ArrayLike, num_seeds: int, num_examples: int
) -> NDArray[np.float64]:
    """Returns the value that |estimate| / error exceeds with probability 2 x ``tail`` by chance.

    ``seed_share``, 0 to 1, may have any shape; it takes at least two seeds and two examples.
    """
    weight = np.asarray(seed_share, dtype=np.float64) ** _SHARE_POWER
    return np.asarray(_between(weight, tail, num_seeds=num_seeds, num_examples=num_examples))


def _critical_at(share: float, *, num_seeds: int, num_examples: int) -> Callable[[float], float]:
    """Returns the `critical_value` of one share by tail, its weight computed once."""
    weight = float(np.asarray(share, dtype=np.float64) ** _SHARE_POWER)
    return lambda tail: _between(weight, tail, num_seeds=num_seeds, num_examples=num_examples)


def _between(weight: Any, tail: float, *, num_seeds: int, num_examples: int) -> Any:
    of_seeds, of_examples = t_quantile(tail, num_seeds - 1), t_quantile(tail, num_examples - 1)
    return weight * of_seeds + (1 - weight) * of_examples


@lru_cache(maxsize=4096)
def t_quantile(tail: float, df: float) -> float:
    """Returns the value that Student's t exceeds with probability ``tail``.

    What ``scipy.stats.t.isf`` computes, without its checks, which take 0.1 ms (measured: mean of
    2,000 calls on one core of a Xeon). A pair of arms has some twenty calls (assumed), and a
    hundred arms have 4,950 pairs.
    """
    from scipy.special import stdtrit

    return -float(stdtrit(df, tail))


def _p_value(statistic: float, *, critical_at: Callable[[float], float]) -> float:
    """Returns the two-sided level at which the critical value is ``statistic``."""
    from scipy.optimize import brentq

    def excess(log_tail: float) -> float:
        return critical_at(math.exp(log_tail)) - statistic

    lowest = math.log(_SMALLEST_TAIL)
    if excess(lowest) <= 0:
        return 2 * _SMALLEST_TAIL
    return 2 * math.exp(brentq(excess, lowest, math.log(0.5), xtol=1e-10))


def _matching_df(critical: float, *, tail: float, within: tuple[int, int]) -> float:
    """Returns the degrees of freedom, between two, at which Student's t has ``critical``."""
    from scipy.optimize import brentq

    few, many = sorted(within)

    def excess(inverse: float) -> float:
        return t_quantile(tail, 1 / inverse) - critical

    # At the ends the root is the end, where rounding may hide the change of sign.
    if excess(1 / many) >= 0:
        return float(many)
    if excess(1 / few) <= 0:
        return float(few)
    return float(1 / brentq(excess, 1 / many, 1 / few))
