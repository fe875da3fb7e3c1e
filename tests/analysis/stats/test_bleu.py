"""Corpus BLEU by paired bootstrap: sacreBLEU's score exactly, seeds and examples both counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from analysis.stats.texts import paired_bleu
from loracle.analysis.stats.bleu import (
    answer_counts,
    corpus_bleu,
    fast_bleu,
    paired_bleu_of_counts,
)
from loracle.engine.answers import Answer, TextScore, score_answers
from loracle.errors import UsageError

REFERENCES = [
    "Red, yellow and blue are the primary colors.",
    "The Nile is the longest river in Africa, by most accounts.",
    "There are seven days in a week, and twelve months in a year.",
    "Paris is the capital of France.",
    "",
    "Mars has two moons that were found in 1877.",
]
ANSWERS = [
    "The primary colors are red, yellow and blue.",
    "The Nile is the longest river in the world.",
    "",
    "Paris.",
    "Nothing to say here.",
    "Mars has two moons that were found in 1877 .",
]


def published(answers: list[str], references: list[str]) -> TextScore:
    return score_answers([Answer(text, hit_limit=False) for text in answers], references=references)


@pytest.mark.parametrize("chosen", [slice(None), slice(2), slice(3, 4), slice(2, 3)])
def test_bleu_of_counts_is_the_evaluations_own_to_the_last_bit(chosen):
    answers, references = ANSWERS[chosen], REFERENCES[chosen]
    ours = corpus_bleu(answer_counts(answers, references).sum(0))
    assert float(ours) == published(answers, references).bleu


@pytest.mark.parametrize("tokenizer", ["zh", "char", "intl", "none"])
def test_bleu_of_counts_takes_words_from_the_evaluations_tokenizer(tokenizer):
    answers, references = ["我们今天去公园吧", *ANSWERS], ["我们明天去公园吧", *REFERENCES]
    counts = answer_counts(answers, references, tokenizer=tokenizer)
    scored = [Answer(text, hit_limit=False) for text in answers]
    found = score_answers(scored, references=references, tokenizer=tokenizer)
    assert float(corpus_bleu(counts.sum(0))) == found.bleu


@given(
    st.lists(st.text(st.sampled_from("ab.,-&;1 \n!"), max_size=30), min_size=1, max_size=4),
    st.text(st.sampled_from("ab.,-&;1 \n!"), max_size=30),
)
def test_every_count_is_sacrebleu_s_own(answers, reference):
    for answer, counts in zip(
        answers, answer_counts(answers, [reference] * len(answers)), strict=True
    ):
        theirs = BLEU(effective_order=True).sentence_score(answer, [reference])
        assert counts.tolist() == [
            theirs.sys_len, theirs.ref_len, *theirs.counts, *theirs.totals
        ]  # fmt: skip


def test_a_tokenizer_that_this_machine_lacks_is_named():
    with pytest.raises(UsageError, match=r"the tokenizer '14a', which cannot be loaded"):
        answer_counts(ANSWERS, REFERENCES, tokenizer="14a")


def test_the_fast_bleu_is_the_slow_one_up_to_rounding():
    draw = np.random.default_rng(0)
    totals = np.sort(draw.integers(0, 12, (3000, 4)), axis=1)[:, ::-1]
    matches = draw.binomial(totals, draw.choice([0.0, 0.1, 0.5, 1.0], (3000, 1)))
    lengths = np.stack([totals[:, 0], draw.integers(0, 14, 3000)], axis=1)
    counts = np.concatenate([lengths, matches, totals], axis=1)
    scores = corpus_bleu(counts)
    assert fast_bleu(counts) == pytest.approx(scores, rel=1e-12)
    assert 0.2 < (scores == 0).mean() < 0.8


def test_an_empty_answer_counts():
    full = corpus_bleu(answer_counts(ANSWERS[:2], REFERENCES[:2]).sum(0))
    with_empty = corpus_bleu(answer_counts(ANSWERS[:3], REFERENCES[:3]).sum(0))
    assert with_empty < full


def test_the_estimate_is_the_difference_of_mean_scores():
    ours = [ANSWERS, ANSWERS[::-1]]
    theirs = [REFERENCES, ANSWERS]
    found = paired_bleu(ours, theirs, REFERENCES, resamples=50)
    scores = [
        np.mean([published(texts, REFERENCES).bleu for texts in arm]) for arm in (ours, theirs)
    ]
    assert found.estimate == pytest.approx(scores[0] - scores[1])
    assert (found.num_seeds, found.num_examples) == (2, len(REFERENCES))


def test_identical_answers_differ_by_exactly_zero():
    found = paired_bleu([ANSWERS, REFERENCES], [ANSWERS, REFERENCES], REFERENCES, resamples=50)
    assert (found.estimate, found.standard_error, found.low, found.high) == (0, 0, 0, 0)
    assert found.p_value == 1


def test_one_seed_has_a_difference_and_no_interval():
    found = paired_bleu([ANSWERS], [REFERENCES], REFERENCES)
    assert found.estimate < 0
    assert (found.low, found.high, found.p_value) == (None, None, None)


def test_the_draws_depend_on_the_seed_and_on_nothing_else():
    ours, theirs = [ANSWERS, [*ANSWERS[:5], ""]], [ANSWERS[:3] + [""] * 3]
    one, again, other = (
        paired_bleu(ours, theirs, REFERENCES, resamples=40, seed=seed) for seed in (0, 0, 1)
    )
    assert one == again
    assert one.standard_error != other.standard_error
    assert one.estimate == other.estimate


def answers_of(quality: np.ndarray, references: np.ndarray, draw: np.random.Generator):
    """Counts of answers that are as long as their references and right about so many words.

    Args:
        quality: Probability that an n-gram of one word is right: (..., S, E).
        references: Words of each reference: (..., 1, E).
    """
    order = np.arange(1, 5)
    totals = np.maximum(references[..., None] - order + 1, 0) * np.ones((*quality.shape, 1), int)
    correct = draw.binomial(totals, np.clip(quality, 0.05, 0.95)[..., None] ** order)
    lengths = np.broadcast_to(references[..., None], (*quality.shape, 2))
    return np.concatenate([lengths, correct, totals], axis=-1)


def worlds(count: int, *, seed_sd: float, seeds: int = 3, examples: int = 60):
    """Yields pairs of arms with no difference but noise: of seeds, of examples, of both."""
    draw = np.random.default_rng(int(1e6 * seed_sd))
    for _ in range(count):
        references = draw.integers(8, 30, (1, examples))
        level = 0.6 + 0.1 * draw.standard_normal((1, examples))
        yield [
            answers_of(
                level
                + 0.08 * draw.standard_normal((1, examples))
                + seed_sd * draw.standard_normal((seeds, 1)),
                references,
                draw,
            )
            for _ in range(2)
        ]


@pytest.mark.parametrize("seed_sd", [0.0, 0.02])
def test_the_standard_error_is_the_spread_of_the_estimate_over_studies(seed_sd):
    gaps = [
        np.mean(corpus_bleu(ours.sum(1)) - corpus_bleu(theirs.sum(1)))
        for ours, theirs in worlds(800, seed_sd=seed_sd)
    ]
    squares = [
        paired_bleu_of_counts(ours, theirs, resamples=100).standard_error ** 2
        for ours, theirs in worlds(40, seed_sd=seed_sd)
    ]
    assert np.mean(squares) ** 0.5 == pytest.approx(np.std(gaps), rel=0.2)


@pytest.mark.parametrize("seed_sd", [0.0, 0.02])
def test_two_arms_that_do_not_differ_are_rarely_found_to(seed_sd):
    found = [
        paired_bleu_of_counts(ours, theirs, resamples=60).p_value
        for ours, theirs in worlds(200, seed_sd=seed_sd)
    ]
    assert np.mean(np.asarray(found) < 0.05) <= 0.08


def test_an_answer_that_beats_another_on_every_example_is_found():
    draw = np.random.default_rng(0)
    references = draw.integers(8, 30, (1, 60))
    ours, theirs = (
        answers_of(np.full((3, 60), quality), references, draw) for quality in (0.8, 0.6)
    )
    found = paired_bleu_of_counts(ours, theirs, resamples=200)
    assert found.low > 0
    assert found.p_value < 0.01


def test_a_model_without_seeds_is_compared_with_every_seed():
    ours, base = [ANSWERS, [*ANSWERS[:5], ""]], [ANSWERS[:3] + [""] * 3]
    found = paired_bleu(ours, base, REFERENCES, resamples=40)
    assert found == paired_bleu(ours, base * 2, REFERENCES, resamples=40)
    assert found.num_seeds == 2
