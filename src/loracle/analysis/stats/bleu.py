"""The difference of two arms' corpus BLEU by paired bootstrap, with seeds counted too.

Shape legend: S seeds, E examples, R resamples, 10 counts per answer: its length, the reference's,
and its matching and all n-grams of 1 to 4 words.

BLEU is no mean over examples, so what the examples contribute to its variance comes from drawing
the examples again with replacement, the same for both arms and all seeds (Koehn 2004, Statistical
significance tests for machine translation evaluation). Drawing the seeds again as well would cover
far less than it says: three seeds drawn with replacement have two thirds of their variance. So the
seeds' part is the variance between their differences, and both parts go through the same rule as
those of the loss (`difference`). Of the covariance between seeds that the bootstrap
shows, only what they share is the examples' part: what differs by seed and example is already in
the seeds'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.analysis.stats.difference import ALPHA, Difference, difference_of
from loracle.config.bleu import DEFAULT, bleu_metric, lacks
from loracle.errors import UsageError
from loracle.seeds import numpy_stream

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

_ORDERS = 4
_LENGTHS = range(1, _ORDERS + 1)


def answer_counts(
    answers: Sequence[str], references: Sequence[str], *, tokenizer: str = DEFAULT
) -> Counts:
    """Returns the counts of each answer that corpus BLEU is computed from: (E, 10).

    Raises:
        UsageError: If this machine lacks the tokenizer.
    """
    missing = lacks(tokenizer)
    if missing is not None:
        raise UsageError(f"BLEU was counted with the tokenizer '{tokenizer}', which {missing}")
    words = _metric(tokenizer).tokenizer
    rows = [
        _pair_counts(words(answer.rstrip()).split(), _reference(reference, tokenizer=tokenizer))
        for answer, reference in zip(answers, references, strict=True)
    ]
    return np.asarray(rows, dtype=np.int64).reshape(-1, 2 + 2 * _ORDERS)


@lru_cache
def _metric(tokenizer: str) -> Any:
    return bleu_metric(tokenizer)


@dataclass(frozen=True)
class _Reference:
    """A reference text, which is the same for every run of a study."""

    length: int
    """Words."""
    ngrams: tuple[Mapping[tuple[str, ...], int], ...]
    """How often each n-gram stands in it, for n from 1."""


@lru_cache(maxsize=4096)
def _reference(text: str, *, tokenizer: str) -> _Reference:
    words = _metric(tokenizer).tokenizer(text.rstrip()).split()
    return _Reference(len(words), tuple(Counter(_ngrams(words, n)) for n in _LENGTHS))


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _pair_counts(words: Sequence[str], reference: _Reference) -> list[int]:
    """Returns what sacreBLEU counts in one answer; tests compare them."""
    matches = []
    for n, known in zip(_LENGTHS, reference.ngrams, strict=True):
        found = Counter(filter(known.__contains__, _ngrams(words, n)))
        matches.append(sum(min(count, known[ngram]) for ngram, count in found.items()))
    totals = [max(0, len(words) + 1 - n) for n in _LENGTHS]
    return [len(words), reference.length, *matches, *totals]


def corpus_bleu(counts: Counts) -> Floats:
    """Returns corpus BLEU as sacreBLEU computes it by default, of sums of counts: (..., 10)."""
    from sacrebleu.metrics import BLEU

    scores = [
        BLEU.compute_bleu(
            correct=row[2 : 2 + _ORDERS],
            total=row[2 + _ORDERS :],
            sys_len=row[0],
            ref_len=row[1],
            smooth_method="exp",
        ).score
        for row in counts.reshape(-1, counts.shape[-1]).tolist()
    ]
    return np.asarray(scores, dtype=np.float64).reshape(counts.shape[:-1])


def fast_bleu(counts: Counts) -> Floats:
    """Returns what `corpus_bleu` does up to rounding, of thousands of sums at once: (..., 10).

    With sacreBLEU's default smoothing: the k-th order without a match counts 2^-k matches.
    """
    lengths, references = counts[..., 0], counts[..., 1]
    matches, totals = counts[..., 2 : 2 + _ORDERS], counts[..., 2 + _ORDERS :]
    is_missed = matches == 0
    smoothed = np.where(is_missed, 0.5 ** is_missed.cumsum(-1), matches)
    # An order without n-grams, or no match at all, is a score of 0: log 0 and exp of it.
    with np.errstate(divide="ignore"):
        logs = np.log(np.where(totals > 0, smoothed, 0)) - np.log(np.maximum(totals, 1))
        brevity = np.minimum(0, 1 - references / np.maximum(lengths, 1))
    score = 100 * np.exp(brevity + logs.mean(-1))
    return np.where(is_missed.all(-1), 0.0, score)


def paired_bleu_of_counts(
    a: Counts,
    b: Counts,
    *,
    resamples: int = 1000,
    seed: int = 0,
    coverage: float = 1 - ALPHA,
) -> Difference:
    """Returns the difference in corpus BLEU, 0 to 100 points, averaged over the seeds.

    Args:
        a: Counts from `answer_counts`: (S, E, 10).
        b: Counts of the other arm; (1, E, 10) for a model without seeds.
        resamples: Times that the examples are drawn again.
        seed: Seed of the draws.
        coverage: Probability that the interval holds the true difference.
    """
    num_seeds, num_examples, _ = a.shape
    by_seed = corpus_bleu(a.sum(1)) - corpus_bleu(b.sum(1))
    seed_variance = example_variance = 0.0
    if num_seeds > 1:
        drawn = _times_drawn(num_examples, resamples=resamples, seed=seed)
        again = fast_bleu(_sums(drawn, a)) - fast_bleu(_sums(drawn, b))
        seed_variance = float(by_seed.var(ddof=1)) / num_seeds
        example_variance = _shared_variance(again, num_examples=num_examples)
    return difference_of(
        float(by_seed.mean()),
        seed_variance=seed_variance,
        example_variance=example_variance,
        num_seeds=num_seeds,
        num_examples=num_examples,
        coverage=coverage,
    )


@lru_cache(maxsize=8)
def _times_drawn(num_examples: int, *, resamples: int, seed: int) -> Counts:
    """Returns how often each example is in each resample: (R, E)."""
    even = np.full(num_examples, 1 / num_examples)
    return numpy_stream(seed, "bootstrap").multinomial(num_examples, even, size=resamples)


def _sums(drawn: Counts, counts: Counts) -> Counts:
    """Returns the counts of each resample: (R, E) and (S, E, 10) to (R, S, 10)."""
    num_seeds, num_examples, width = counts.shape
    side_by_side = counts.transpose(1, 0, 2).reshape(num_examples, -1)
    # Whole numbers below 2**53: products of doubles are exact, and much faster.
    sums = drawn.astype(np.float64) @ side_by_side.astype(np.float64)
    return sums.astype(np.int64).reshape(-1, num_seeds, width)


def _shared_variance(again: Floats, *, num_examples: int) -> float:
    """Returns the mean covariance between two seeds over the resamples, (R, S); 0 if negative.

    A bootstrap's variance of a mean is short of one example in ``num_examples``.
    """
    num_seeds = again.shape[1]
    covariance = np.cov(again, rowvar=False)
    between = (covariance.sum() - covariance.trace()) / (num_seeds * (num_seeds - 1))
    return max(float(between), 0.0) * num_examples / max(num_examples - 1, 1)
