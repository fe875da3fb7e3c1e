"""Verdicts of a study: every arm against the reference, with intervals and noise.

Families of comparisons, each corrected by Holm on its own: all arms against the reference, all
arms against the untuned model, all pairs of arms; each metric is a family of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from loracle.analysis.comparison import METRICS, UNTUNED, Comparison, Metric, judged
from loracle.analysis.costs import Axis, arm_costs
from loracle.analysis.outcomes import Outcomes, compare_bleu, compare_losses, read_outcomes
from loracle.analysis.summaries import (
    ArmSummary,
    NoiseFloor,
    measure_noise,
    summarise_arm,
    summarise_untuned,
)
from loracle.records.study_folder import StudyRecord

SCHEMA = 1

_Names = tuple[str, str, Metric]


@dataclass(frozen=True)
class CostDifference:
    """Cost of an arm beside the reference's; not tested."""

    arm: str
    axis: Axis
    value: float
    """Median over the arm's runs."""
    reference_value: float
    """Median over the reference's runs."""
    ratio: float
    """value / reference_value."""


@dataclass(frozen=True)
class Verdicts:
    """All results of a study's statistics."""

    reference: str
    seeds: tuple[int, ...]
    """Seeds with a completed run of any arm."""
    num_examples: int
    """Scored validation examples."""
    num_tokens: int
    """Target tokens of these."""
    num_answers: int
    """Answered validation examples; 0: no BLEU."""
    summaries: tuple[ArmSummary, ...]
    """Arms with a completed run, in the study's order."""
    untuned: ArmSummary
    """The model before training."""
    comparisons: tuple[Comparison, ...]
    """Every other arm against the reference: losses, then BLEU if it was measured."""
    versus_untuned: tuple[Comparison, ...]
    """Every arm against the untuned model: losses, then BLEU if it was measured."""
    pairs: tuple[Comparison, ...]
    """Losses of every two arms, each pair once."""
    costs: tuple[CostDifference, ...]
    """Every other arm against the reference, on each axis measured for both."""
    noise: Mapping[Metric, NoiseFloor]
    coverage: float
    """Probability that an interval holds the true difference; verdicts rest on p, not on it."""

    def comparison(self, arm: str, *, metric: Metric = "loss_nats_per_token") -> Comparison | None:
        """Returns an arm's comparison with the reference; None: not measured, or itself."""
        return self._by_names["comparisons"].get((arm, self.reference, metric))

    def against_untuned(
        self, arm: str, *, metric: Metric = "loss_nats_per_token"
    ) -> Comparison | None:
        """Returns an arm's comparison with the untuned model; None: not measured."""
        return self._by_names["versus_untuned"].get((arm, UNTUNED, metric))

    def pair(self, arm: str, other: str) -> Comparison | None:
        """Returns the comparison of two arms' losses, arm minus other; None: not measured."""
        pair = self._by_names["pairs"].get((arm, other, "loss_nats_per_token"))
        mirrored = self._by_names["pairs"].get((other, arm, "loss_nats_per_token"))
        return pair or (mirrored and mirrored.reversed())

    def is_worse(self, arm: str, other: str) -> bool:
        """Returns whether an arm is established to have a higher loss than another.

        Pairs are corrected over all pairs. Against the reference the table's verdict, corrected
        over the arms, counts too: advice must not contradict the table above it.
        """
        pairs, table = self._by_names["pairs"], self._by_names["comparisons"]
        key: _Names = (arm, other, "loss_nats_per_token")
        opposite: _Names = (other, arm, "loss_nats_per_token")
        worse = [of[key].verdict == "worse" for of in (pairs, table) if key in of]
        better = [of[opposite].verdict == "better" for of in (pairs, table) if opposite in of]
        return any((*worse, *better))

    @cached_property
    def _by_names(self) -> dict[str, dict[_Names, Comparison]]:
        """Comparisons by their arms and metric: a hundred arms have 4950 pairs to look among."""
        families = ("comparisons", "versus_untuned", "pairs")
        return {
            family: {(c.arm, c.reference, c.metric): c for c in getattr(self, family)}
            for family in families
        }

    def summary(self, arm: str) -> ArmSummary | None:
        """Returns an arm's summary; None: no run of it completed."""
        return self._summaries.get(arm)

    @cached_property
    def _summaries(self) -> dict[str, ArmSummary]:
        return {summary.arm: summary for summary in self.summaries}

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of ``verdicts.json``; null: not measured."""
        lists = {
            key: [comparison.to_json() for comparison in comparisons]
            for key, comparisons in (
                ("comparisons", self.comparisons),
                ("versus_untuned", self.versus_untuned),
                ("pairs", self.pairs),
            )
        }
        noise = [asdict(noise) for noise in self.noise.values()]
        rest = asdict(replace(self, comparisons=(), versus_untuned=(), pairs=()))
        return {"schema": SCHEMA, **rest, **lists, "noise": noise}


def judge(study: StudyRecord) -> Verdicts:
    """Returns the verdicts over the study's completed runs.

    Two arms are compared over the seeds that both completed.

    Raises:
        RunFolderError: If two runs were not scored on the same examples.
    """
    outcomes, noise = read_outcomes(study), measure_noise(study)
    arms = [arm.name for arm in study.arms if study.runs_of(arm.name)]
    others = [(arm, study.reference) for arm in arms if arm != study.reference]
    metrics = METRICS if outcomes.num_answers else METRICS[:1]
    floors = {metric: noise[metric].floor for metric in metrics}
    return Verdicts(
        reference=study.reference,
        seeds=tuple(sorted({seed for arm in arms for seed in study.runs_of(arm)})),
        num_examples=len(outcomes.tokens),
        num_tokens=int(outcomes.tokens.sum()),
        num_answers=outcomes.num_answers,
        summaries=tuple(summarise_arm(study, arm) for arm in arms),
        untuned=summarise_untuned(study),
        comparisons=_families(outcomes, others, floors),
        versus_untuned=_families(outcomes, [(arm, UNTUNED) for arm in arms], floors),
        pairs=_families(
            outcomes,
            list(combinations(arms, 2)),
            {"loss_nats_per_token": floors["loss_nats_per_token"]},
        ),
        costs=_cost_differences(study, arms),
        noise=noise,
        coverage=outcomes.coverage,
    )


def _families(
    outcomes: Outcomes, pairs: list[tuple[str, str]], floors: Mapping[Metric, float | None]
) -> tuple[Comparison, ...]:
    """Returns the comparisons of each metric in ``floors``, one family per metric."""
    compare = {"loss_nats_per_token": compare_losses, "bleu": compare_bleu}
    return tuple(
        comparison
        for metric, floor in floors.items()
        for comparison in judged(
            [compare[metric](outcomes, arm, other, noise_floor=floor) for arm, other in pairs]
        )
    )


def _cost_differences(study: StudyRecord, arms: list[str]) -> tuple[CostDifference, ...]:
    reference = {axis: cost.median for axis, cost in arm_costs(study, study.reference).items()}
    return tuple(
        CostDifference(arm, axis, cost.median, reference[axis], ratio=cost.median / reference[axis])
        for arm in arms
        if arm != study.reference
        for axis, cost in arm_costs(study, arm).items()
        if axis in reference
    )
