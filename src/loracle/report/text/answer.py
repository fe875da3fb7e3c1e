"""The answer and its notes in words, never more than the verdicts establish."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.analysis.comparison import Comparison, Metric
from loracle.analysis.rate_search import shared_rate
from loracle.analysis.summaries import NoiseFloor
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord
from loracle.report.text.numbers import BLEU_DECIMALS, LOSS_DECIMALS
from loracle.text import plural

_UNITS: dict[Metric, tuple[str, int]] = {
    "loss_nats_per_token": ("nats per token", LOSS_DECIMALS),
    "bleu": ("BLEU points", BLEU_DECIMALS),
}


def answer(study: StudyRecord, verdicts: Verdicts) -> list[str]:
    """Returns what the study found, a paragraph per statement."""
    caveat = rate_caveat(study)
    return [caveat, *_findings(verdicts)] if caveat else _findings(verdicts)


def rate_caveat(study: StudyRecord) -> str:
    """Returns that one unsearched rate does not rank places, or nothing where that is not so."""
    rate = shared_rate(study)
    if rate is None:
        return ""
    return (
        f"All arms with adapters ran at one learning rate, {rate.learning_rate:g}, with ranks of "
        f"{rate.lowest_rank} to {rate.highest_rank}, and no arm's rate was searched. The "
        f"differences hold at this rate only; they do not rank places."
    )


def at_one_rate(study: StudyRecord) -> str:
    """Returns a caption's short form of `rate_caveat`, with a space before it."""
    rate = shared_rate(study)
    return f" At one unsearched learning rate ({rate.learning_rate:g})." if rate else ""


def _findings(verdicts: Verdicts) -> list[str]:
    losses = of_metric(verdicts.comparisons, "loss_nats_per_token")
    sentences = [_found(losses, reference=verdicts.reference, by="validation loss")]
    bleu = of_metric(verdicts.comparisons, "bleu")
    if any(comparison.interval for comparison in bleu):
        sentences.append(_found(bleu, reference=verdicts.reference, by="BLEU"))
    untuned = of_metric(verdicts.versus_untuned, "loss_nats_per_token")
    if any(comparison.interval for comparison in untuned):
        sentences.append(_beside_untuned(untuned))
    return sentences


def of_metric(comparisons: Sequence[Comparison], metric: Metric) -> list[Comparison]:
    """Returns the comparisons of one metric, in their order."""
    return [comparison for comparison in comparisons if comparison.metric == metric]


def with_verdict(comparisons: Sequence[Comparison], verdict: str) -> list[str]:
    """Returns the arms that came out so."""
    return [comparison.arm for comparison in comparisons if comparison.verdict == verdict]


def _found(comparisons: Sequence[Comparison], *, reference: str, by: str) -> str:
    if not comparisons:
        return f"No placement has a completed run to compare with {reference}."
    if not any(comparison.interval for comparison in comparisons):
        return (
            f"{plural(len(comparisons), 'placement')} ran beside {reference}, but without a second "
            f"seed there is no interval, so none can be called better or worse by {by}."
        )
    better, worse = with_verdict(comparisons, "better"), with_verdict(comparisons, "worse")
    open_ = with_verdict(comparisons, "not distinguishable")
    parts = [_counted(better, "better"), _counted(worse, "worse")]
    if open_:
        parts.append(_counted(open_, "not distinguishable from it"))
    return (
        f"By {by}, of {plural(len(comparisons), 'placement')} compared with {reference}, "
        f"{', '.join(parts[:-1])}{',' if open_ else ''} and {parts[-1]}."
    )


def _counted(arms: Sequence[str], what: str) -> str:
    if not arms:
        return f"none is {what}"
    return f"{len(arms)} {'is' if len(arms) == 1 else 'are'} {what} ({', '.join(arms)})"


def _beside_untuned(comparisons: Sequence[Comparison]) -> str:
    better = with_verdict(comparisons, "better")
    if len(better) == len(comparisons):
        return (
            f"Every arm has a lower loss than the untuned model ({len(better)} of {len(better)})."
        )
    return (
        f"{len(better)} of {plural(len(comparisons), 'arm')} can be told to have a lower loss than "
        f"the untuned model."
    )


def noise_words(verdicts: Verdicts) -> list[str]:
    """Returns what the study measured of its own noise, a paragraph per metric."""
    metrics = [m for m in verdicts.noise if m != "bleu" or verdicts.num_answers]
    return [" ".join(_noise_of(metric, verdicts.noise[metric])) for metric in metrics]


def _noise_of(metric: Metric, noise: NoiseFloor) -> list[str]:
    unit, decimals = _UNITS[metric]
    sentences = []
    if noise.repeats is None:
        sentences.append(f"Noise floor in {unit}: not measured, no run was repeated.")
    elif noise.floor == 0:
        sentences.append(
            f"Noise floor in {unit}: zero; {plural(len(noise.repeats), 'repeat')} with the same "
            f"seed gave exactly the same."
        )
    else:
        sentences.append(
            f"Noise floor in {unit}: {noise.floor:.{decimals}f}, the largest difference between a "
            f"run and {plural(len(noise.repeats), 'repeat')} of it with the same seed."
        )
    if noise.seeds_sd is not None:
        sentences.append(
            f"Over {plural(noise.num_seeds, 'seed')} of {noise.seeds_arm}, the standard deviation "
            f"is {noise.seeds_sd:.{decimals}f} {unit}."
        )
    return sentences


def largest_smallest_effect(verdicts: Verdicts) -> float | None:
    """Returns the loss difference that the design finds four times in five in every arm."""
    losses = of_metric(verdicts.comparisons, "loss_nats_per_token")
    found = [comparison.smallest_effect for comparison in losses]
    return max((effect for effect in found if effect is not None), default=None)
