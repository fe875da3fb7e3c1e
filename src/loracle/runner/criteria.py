"""The four success criteria of the baseline, each with a sentence of evidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from loracle.analysis.stats.difference import t_quantile
from loracle.engine.evaluate import ExampleScore, likelihood
from loracle.engine.measure import Parameters
from loracle.records.files import read_jsonl
from loracle.records.find_runs import sound_results
from loracle.records.names import STEPS
from loracle.records.result import Criterion, perplexity_of
from loracle.text import perplexity_words, plural

T = TypeVar("T")

# assumed: with fewer, an interval over examples says nothing
_FEWEST = 10
_PARTS = 5
_SHOWN = 6
# assumed: "significantly fewer" in the sense of the plan is at least ten times fewer
_FEW = 0.1
# assumed: runs whose validation losses agree within 0.1 % are consistent
_CONSISTENT = 1e-3


@dataclass(frozen=True)
class Change:
    """How a loss changed between two models on the same examples."""

    nats_per_token: float
    """After minus before."""
    low: float | None
    """Lower end of the 95 % interval over examples; None: too few of them."""
    high: float | None

    @property
    def fell(self) -> bool | None:
        """Whether the loss is lower after; None: the examples are too few or too noisy to tell."""
        if self.low is None or self.high is None or self.low < 0 < self.high:
            return None
        return self.high < 0

    def words(self) -> str:
        """Returns ``-0.115 nats per token, 95 % interval -0.140 to -0.090``."""
        shown = f"{self.nats_per_token:+.3f} nats per token"
        if self.low is None:
            return shown
        return f"{shown}, 95 % interval {self.low:+.3f} to {self.high:+.3f}"


def change(
    before: Sequence[ExampleScore], after: Sequence[ExampleScore], *, tail: float = 0.025
) -> Change:
    """Returns the token-weighted change in loss on the same examples.

    A ratio of sums, so its error is that of (D_e - n_e theta) / mean(n) to first order, D_e and n_e
    being an example's difference and tokens (Cochran 1977, Sampling Techniques, chapter 6).

    Args:
        before: Scores of the first model.
        after: Scores of the second, of the same examples in the same order.
        tail: Probability beyond each end of the interval.
    """
    pairs = list(zip(before, after, strict=True))
    differences = [b.nll_sum_nats - a.nll_sum_nats for a, b in pairs]
    tokens = [a.num_targets for a, _ in pairs]
    mean = math.fsum(differences) / sum(tokens)
    if len(pairs) < _FEWEST:
        return Change(mean, None, None)
    size = statistics.fmean(tokens)
    around = [(d - n * mean) / size for d, n in zip(differences, tokens, strict=True)]
    error = statistics.stdev(around, xbar=0.0) / math.sqrt(len(pairs))
    half = t_quantile(tail, len(pairs) - 1) * error
    return Change(mean, mean - half, mean + half)


def convergence(
    base: Sequence[ExampleScore],
    validations: Mapping[int, Sequence[ExampleScore]],
    *,
    losses: Sequence[float] = (),
) -> Criterion:
    """Returns whether training lowered the loss, and did not lose again what it had gained.

    Judged on the same held-out examples before, during and after training. The training losses
    themselves are shown and not judged: every step sees other examples, and their differences hide
    a fall that the same examples show.

    Args:
        base: Scores of the untuned model.
        validations: Scores of the tuned one by step, the last step's among them.
        losses: Training loss of each step, nats per token.
    """
    if not base or not validations:
        return Criterion(None, "No held-out example was scored before and after training.")
    last = max(validations)
    whole = change(base, validations[last])
    trail = [base, *(validations[step] for step in sorted(validations))]
    shown = " -> ".join(f"{likelihood(s).loss_nats_per_token:.3f}" for s in _thinned(trail))
    evidence = (
        f"Loss on the same {len(base)} held-out examples, untuned to step {last}: {shown} "
        f"({whole.words()})"
    )
    passed, why = _verdict(whole, len(base))
    rise = _rise(validations) if passed else None
    if rise is not None:
        passed, why = False, f": {rise}"
    return Criterion(passed, f"{evidence}{why}.{_training_words(losses)}")


def _verdict(found: Change, num_examples: int) -> tuple[bool | None, str]:
    """Returns whether a loss fell, and what forbids to tell."""
    if found.low is None:
        few = f": {plural(num_examples, 'example')} are too few to tell (at least {_FEWEST})"
        return None, few
    if found.fell is None:
        return None, ": within the noise of the examples, so not judged"
    return found.fell, ""


def _rise(validations: Mapping[int, Sequence[ExampleScore]]) -> str | None:
    """Returns how far the last validation is above the best before it; None: not beyond noise."""
    *earlier, last = sorted(validations)
    if not earlier:
        return None
    best = min(earlier, key=lambda step: likelihood(validations[step]).loss_nats_per_token)
    # The best was chosen among all, so the chance of each counts.
    since = change(validations[best], validations[last], tail=0.025 / len(earlier))
    if since.low is None or since.low <= 0:
        return None
    return f"{since.nats_per_token:.3f} above step {best}, beyond the noise of the examples"


def _thinned(points: Sequence[T]) -> list[T]:
    """Returns at most ``_SHOWN`` points, evenly chosen, the first and the last among them."""
    if len(points) <= _SHOWN:
        return list(points)
    return [points[round(k * (len(points) - 1) / (_SHOWN - 1))] for k in range(_SHOWN)]


def _training_words(losses: Sequence[float]) -> str:
    size = max(1, len(losses) // _PARTS)
    if len(losses) < 2:
        return ""
    first, last = statistics.fmean(losses[:size]), statistics.fmean(losses[-size:])
    which = "step" if size == 1 else f"{size:,} steps"
    return (
        f" Training loss {first:.3f} -> {last:.3f} in the first and the last {which}, on other "
        f"examples each."
    )


def validation(base: Sequence[ExampleScore], tuned: Sequence[ExampleScore]) -> Criterion:
    """Returns whether held-out perplexity improved over the untuned model."""
    if not base:
        return Criterion(None, "No held-out example was scored.")
    before, after = likelihood(base), likelihood(tuned)
    better = sum(t.nll_sum_nats < b.nll_sum_nats for b, t in zip(base, tuned, strict=True))
    found = change(base, tuned)
    passed, why = _verdict(found, len(base))
    # A ratio of perplexities is finite where they themselves are not.
    ratio = perplexity_of(found.nats_per_token)
    percent = "" if ratio is None else f" ({ratio - 1:+.1%})"
    return Criterion(
        passed,
        f"Perplexity {perplexity_words(before.perplexity)} -> {perplexity_words(after.perplexity)}"
        f"{percent} on {after.num_examples} held-out examples, {after.num_targets:,} tokens; "
        f"better on {better} of them{why}.",
    )


def efficiency(parameters: Parameters) -> Criterion:
    """Returns whether far fewer parameters train than in full fine-tuning."""
    frac = parameters.trainable / parameters.base
    return Criterion(
        frac < _FEW,
        f"{parameters.trainable:,} parameters train, {frac:.2%} of the {parameters.base:,} "
        f"of full fine-tuning.",
    )


@dataclass(frozen=True)
class Repeat:
    """The part of a run that repeats of one signature are compared by."""

    name: str
    """Folder of the run."""
    adapter_sha256: str
    losses: tuple[float, ...]
    """Training loss of each step, nats per token."""
    final_loss_nats_per_token: float


def reproducibility(this: Repeat, *, others: Sequence[Repeat]) -> Criterion:
    """Returns whether the same run gave the same result before; None without a repeat."""
    if not others:
        return Criterion(None, "No other run with this signature yet; run it again to tell.")
    exact = [
        other
        for other in others
        if other.adapter_sha256 == this.adapter_sha256 and other.losses == this.losses
    ]
    loss = this.final_loss_nats_per_token
    gap = max(abs(other.final_loss_nats_per_token - loss) for other in others) / (loss or 1.0)
    if len(exact) == len(others):
        evidence = (
            f"Bit-identical adapter and losses in {len(others)} earlier run(s) of this signature "
            f"(sha256 {this.adapter_sha256[:12]}), latest {others[-1].name}."
        )
    else:
        evidence = (
            f"{len(exact)} of {len(others)} earlier run(s) of this signature are bit-identical; "
            f"validation losses differ by at most {gap:.2e} relative."
        )
    return Criterion(gap <= _CONSISTENT, evidence)


def repeats_of(run: Path, *, signature: str) -> list[Repeat]:
    """Returns the finished runs with this signature beside the folder ``run``."""
    return [
        Repeat(
            name=path.name,
            adapter_sha256=result.adapter_sha256,
            losses=tuple(row["loss_nats_per_token"] for row in read_jsonl(path / STEPS)),
            final_loss_nats_per_token=result.quality.tuned.loss_nats_per_token,
        )
        for path, result in sound_results(run.parent, signature=signature)
        if path != run
    ]
