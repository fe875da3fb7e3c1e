"""One arm against another: difference, Holm-corrected p-value, verdict and its reason.

"Better" and "worse" need a p-value below 5% after Holm's correction over all comparisons of the
family, and a difference above the noise floor, by which repeats of one run differ. Anything else is
"not distinguishable", a finding about the design as much as the arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loracle.analysis.stats.difference import ALPHA, Difference
from loracle.analysis.stats.multiple import holm
from loracle.records.result import perplexity_of

Metric = Literal["loss_nats_per_token", "bleu"]
Verdict = Literal["better", "worse", "not distinguishable"]

METRICS: tuple[Metric, ...] = ("loss_nats_per_token", "bleu")
UNTUNED = "untuned"
"""Name of the model before training, in place of an arm."""

_OPPOSITE: dict[Verdict, Verdict] = {
    "better": "worse",
    "worse": "better",
    "not distinguishable": "not distinguishable",
}


@dataclass(frozen=True)
class Comparison:
    """An arm against another one on one metric, arm minus reference."""

    arm: str
    reference: str
    """Another arm, or ``untuned``."""
    metric: Metric
    """``loss_nats_per_token``: lower is better. ``bleu``: higher is better."""
    measured: Difference | None
    """None: no seed completed in both, or the metric was not measured."""
    noise_floor: float | None
    """The largest difference between a run and its repeat; None: not measured."""
    p_holm: float | None = None
    """Two-sided, after Holm's correction over the family; None without an interval."""
    num_comparisons: int = 0
    """Size of the family: comparisons that have a p-value."""
    verdict: Verdict = "not distinguishable"
    """Of the arm, compared with the reference."""
    reason: str = ""
    """The verdict in one sentence with the figures."""

    @property
    def difference(self) -> float | None:
        """Arm minus reference, nats per token or BLEU points."""
        return None if self.measured is None else self.measured.estimate

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the difference over seeds and examples, not corrected for the family."""
        if self.measured is None or self.measured.low is None or self.measured.high is None:
            return None
        return self.measured.low, self.measured.high

    @property
    def p(self) -> float | None:
        """Two-sided p-value, not corrected."""
        return None if self.measured is None else self.measured.p_value

    @property
    def num_seeds(self) -> int:
        """Seeds that completed in both."""
        return self.measured.num_seeds if self.measured else 0

    @property
    def effect_percent(self) -> float | None:
        """Relative change of perplexity in percent, 100 (exp(difference) - 1); loss only."""
        return None if self.difference is None else self._percent(self.difference)

    @property
    def effect_percent_interval(self) -> tuple[float, float] | None:
        """Interval of ``effect_percent``."""
        ends = [self._percent(end) for end in self.interval or ()]
        return (ends[0], ends[1]) if ends and ends[0] is not None and ends[1] is not None else None

    @property
    def smallest_effect(self) -> float | None:
        """Difference found with 80% power at Holm's strictest level."""
        if self.measured is None:
            return None
        return self.measured.smallest_effect_at(ALPHA / max(self.num_comparisons, 1))

    def reversed(self) -> Comparison:
        """Returns the comparison with arm and reference swapped, in the same family."""
        measured = self.measured and replace(
            self.measured,
            estimate=-self.measured.estimate,
            low=None if self.measured.high is None else -self.measured.high,
            high=None if self.measured.low is None else -self.measured.low,
        )
        other = replace(self, arm=self.reference, reference=self.arm, measured=measured)
        return _explained(replace(other, verdict=_OPPOSITE[self.verdict]))

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data, derived figures included."""
        measured = self.measured
        return {
            "arm": self.arm,
            "reference": self.reference,
            "metric": self.metric,
            "difference": self.difference,
            "interval": self.interval and list(self.interval),
            "standard_error": measured and measured.standard_error,
            "degrees_of_freedom": measured and measured.degrees_of_freedom,
            "p": self.p,
            "p_holm": self.p_holm,
            "num_comparisons": self.num_comparisons,
            "effect_percent": self.effect_percent,
            "smallest_effect": self.smallest_effect,
            "noise_floor": self.noise_floor,
            "num_seeds": self.num_seeds,
            "num_examples": measured.num_examples if measured else 0,
            "seed_share": measured and measured.seed_share,
            "verdict": self.verdict,
            "reason": self.reason,
        }

    def _percent(self, difference: float) -> float | None:
        if self.metric != "loss_nats_per_token" or perplexity_of(difference) is None:
            return None
        return 100 * math.expm1(difference)


def judged(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Returns the comparisons of one family with their verdicts, p-values corrected by Holm."""
    corrected = holm([comparison.p for comparison in comparisons])
    size = sum(p is not None for p in corrected)
    return tuple(
        _judged(replace(comparison, p_holm=p_holm, num_comparisons=size))
        for comparison, p_holm in zip(comparisons, corrected, strict=True)
    )


def _judged(comparison: Comparison) -> Comparison:
    verdict: Verdict = "not distinguishable"
    difference, p_holm = comparison.difference or 0.0, comparison.p_holm
    if p_holm is not None and p_holm < ALPHA and abs(difference) > (comparison.noise_floor or 0.0):
        lower_is_better = comparison.metric == "loss_nats_per_token"
        verdict = "better" if (difference < 0) == lower_is_better else "worse"
    return _explained(replace(comparison, verdict=verdict))


def _explained(comparison: Comparison) -> Comparison:
    return replace(comparison, reason=_reason(comparison))


def _reason(comparison: Comparison) -> str:
    measured = comparison.measured
    if measured is None:
        return "Not measured on a seed that completed in both."
    if comparison.interval is None or comparison.p_holm is None:
        few = "one seed" if measured.num_seeds < 2 else "one example"
        return f"{_difference_words(comparison)} on {few}: no interval, so no verdict."
    if measured.standard_error == 0 and measured.estimate == 0:
        return f"Identical to {comparison.reference} on every seed and example."
    decimals = 4 if comparison.metric == "loss_nats_per_token" else 2
    low, high = (f"{end:+.{decimals}f}" for end in comparison.interval)
    p_words = "p < 0.001" if comparison.p_holm < 0.001 else f"p = {comparison.p_holm:.3f}"
    level = f"{100 * measured.coverage:g}%"
    figures = f"{_difference_words(comparison)} ({level} interval {low} to {high}, Holm {p_words})"
    if comparison.p_holm >= ALPHA:
        smallest = comparison.smallest_effect
        visible = (
            f"; a difference of {_amount(comparison, smallest)} would be found" if smallest else ""
        )
        return f"{figures}: this could be chance{visible}."
    if comparison.verdict == "not distinguishable":
        floor = _amount(comparison, comparison.noise_floor or 0.0)
        return f"{figures}: no more than the same run differs by when it is repeated ({floor})."
    return f"{figures}."


def _difference_words(comparison: Comparison) -> str:
    """Returns e.g. ``Loss 0.0512 nats per token above all-linear``."""
    difference = comparison.difference or 0.0
    name = "Loss" if comparison.metric == "loss_nats_per_token" else "BLEU"
    side = "above" if difference > 0 else "below" if difference < 0 else "from"
    return f"{name} {_amount(comparison, abs(difference))} {side} {comparison.reference}"


def _amount(comparison: Comparison, value: float) -> str:
    is_loss = comparison.metric == "loss_nats_per_token"
    return f"{value:.4f} nats per token" if is_loss else f"{value:.2f} points"
