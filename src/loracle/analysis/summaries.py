"""Mean and spread of an arm over its seeds, and the noise floor of a study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loracle.analysis.comparison import METRICS, UNTUNED, Metric
from loracle.records.result import perplexity_of
from loracle.records.study_folder import RunRecord, StudyRecord


@dataclass(frozen=True)
class Summary:
    """A figure over the seeds of an arm."""

    mean: float
    """Over the seeds; of perplexity, exp of the mean loss."""
    sd: float | None
    """Standard deviation between seeds (not of the mean); None with fewer than two."""
    n: int
    """Number of seeds."""


@dataclass(frozen=True)
class ArmSummary:
    """An arm's metrics; None where not measured."""

    arm: str
    """An arm's name, or ``untuned``."""
    loss_nats_per_token: Summary | None
    """Validation loss."""
    perplexity: Summary | None
    """Exp of the mean loss over seeds; the standard deviation is of each seed's perplexity."""
    bleu: Summary | None
    """Corpus BLEU, 0 to 100."""


@dataclass(frozen=True)
class NoiseFloor:
    """How much a metric varies between repeats and between seeds of one arm."""

    metric: Metric
    repeats: tuple[float, ...] | None
    """|difference| of each repeat from the run of the same seed; None: no run was repeated."""
    seeds_arm: str | None
    """The arm with extra seeds; None: no arm has any."""
    seeds_sd: float | None
    """Standard deviation of the metric over all seeds of that arm."""
    num_seeds: int

    @property
    def floor(self) -> float | None:
        """The largest difference between a run and its repeat; None: not measured."""
        return max(self.repeats) if self.repeats else None


def summarise_arm(study: StudyRecord, arm: str) -> ArmSummary:
    """Returns an arm's metrics over its completed seeds."""
    return _summary(arm, list(study.runs_of(arm).values()), model="tuned")


def summarise_untuned(study: StudyRecord) -> ArmSummary:
    """Returns the untuned model's metrics, from the first run of an arm."""
    runs = [run for run in study.runs if run.role == "arm"]
    return _summary(UNTUNED, runs[:1], model="base")


def measure_noise(study: StudyRecord) -> dict[Metric, NoiseFloor]:
    """Returns the noise of each metric, from repeated runs and extra seeds."""
    return {metric: _noise(study, metric) for metric in METRICS}


def _summary(arm: str, runs: Sequence[RunRecord], *, model: str) -> ArmSummary:
    losses = _values(runs, "loss_nats_per_token", model=model)
    perplexity = None
    if losses:
        perplexities = [perplexity_of(loss) for loss in losses]
        mean, finite = perplexity_of(statistics.fmean(losses)), [p for p in perplexities if p]
        if mean is not None and len(finite) == len(losses):
            by_seed = _over_seeds(finite)
            perplexity = Summary(mean, by_seed.sd, by_seed.n)
    bleu = _values(runs, "bleu", model=model)
    return ArmSummary(
        arm=arm,
        loss_nats_per_token=_over_seeds(losses) if losses else None,
        perplexity=perplexity,
        bleu=_over_seeds(bleu) if bleu else None,
    )


def _over_seeds(values: Sequence[float]) -> Summary:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), sd, len(values))


def _values(runs: Sequence[RunRecord], metric: Metric, *, model: str = "tuned") -> list[float]:
    values = [getattr(getattr(run.result.quality, model), metric) for run in runs]
    return [value for value in values if value is not None]


def _noise(study: StudyRecord, metric: Metric) -> NoiseFloor:
    repeats = [value for arm in study.arms for value in _repeat_gaps(study, arm.name, metric)]
    by_arm = {arm.name: study.runs_of(arm.name, role="extra-seed") for arm in study.arms}
    arm = max(by_arm, key=lambda name: len(by_arm[name]))
    values: list[float] = []
    if by_arm[arm]:
        values = _values([*study.runs_of(arm).values(), *by_arm[arm].values()], metric)
    measured = len(values) > 1
    return NoiseFloor(
        metric=metric,
        repeats=tuple(repeats) or None,
        seeds_arm=arm if measured else None,
        seeds_sd=statistics.stdev(values) if measured else None,
        num_seeds=len(values) if measured else 0,
    )


def _repeat_gaps(study: StudyRecord, arm: str, metric: Metric) -> list[float]:
    """Returns the |difference| of each of an arm's repeats from the run that it repeats."""
    first = study.runs_of(arm) | study.runs_of(arm, role="extra-seed")
    gaps = []
    for repeat in study.repeats_of(arm):
        if repeat.seed in first:
            pair = _values([repeat, first[repeat.seed]], metric)
            gaps += [abs(pair[0] - pair[1])] if len(pair) == 2 else []
    return gaps
