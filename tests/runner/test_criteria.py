"""Each criterion says true, false or nothing, and its evidence holds the figures."""

import random
from dataclasses import asdict, replace

import pytest
from scipy.stats import ttest_1samp

from loracle.engine.evaluate import ExampleScore
from loracle.engine.measure import Parameters
from loracle.runner.criteria import (
    Repeat,
    change,
    convergence,
    efficiency,
    reproducibility,
    validation,
)
from loracle.text import plural


def scored(change: float, *, count: int = 50, noise: float = 0.1, seed: int = 0):
    """Scores before and after a change in nats per token, noisy from example to example."""
    draw = random.Random(seed)
    tokens = [draw.randrange(5, 200) for _ in range(count)]
    before = [ExampleScore(n, 2.0 * n * draw.uniform(0.5, 1.5)) for n in tokens]
    after = [
        ExampleScore(score.num_targets, score.nll_sum_nats + n * (change + draw.gauss(0, noise)))
        for score, n in zip(before, tokens, strict=True)
    ]
    return before, after


def test_the_interval_over_examples_of_one_length_is_that_of_students_t():
    before, after = ([replace(s, num_targets=10) for s in scores] for scores in scored(-0.1))
    each = [(a.nll_sum_nats - b.nll_sum_nats) / 10 for b, a in zip(before, after, strict=True)]
    expected = ttest_1samp(each, 0).confidence_interval(0.95)
    found = change(before, after)
    assert found.nats_per_token == pytest.approx(sum(each) / len(each))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_small_fall_on_the_same_examples_is_convergence_whatever_the_batches_held():
    before, after = scored(-0.1)
    found = convergence(before, {60: after}, losses=[1.0, *[3.0] * 59])
    assert found.passed is True
    assert found.evidence.startswith(
        "Loss on the same 50 held-out examples, untuned to step 60: 1.878 -> 1.776 "
        "(-0.103 nats per token, 95 % interval -0.133 to -0.072)."
    )
    assert "Training loss 2.833 -> 3.000 in the first and the last 12 steps, on other" in (
        found.evidence
    )


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_rise_is_none(noise):
    before, after = scored(0.1, noise=noise)
    assert convergence(before, {9: after}).passed is False
    assert validation(before, after).passed is False


def test_a_loss_that_did_not_change_at_all_did_not_fall():
    before, after = scored(0.0, noise=0.0)
    assert convergence(before, {9: after}).passed is False
    assert validation(before, after).passed is False


def test_a_change_within_the_noise_is_not_judged():
    before, after = scored(-0.01, noise=0.5)
    for found in (convergence(before, {9: after}), validation(before, after)):
        assert found.passed is None
        assert ": within the noise of the examples, so not judged." in found.evidence


@pytest.mark.parametrize("count", [1, 2, 9])
def test_too_few_examples_tell_nothing(count):
    before, after = scored(-1.0, count=count)
    for found in (convergence(before, {9: after}), validation(before, after)):
        assert found.passed is None
        assert f": {plural(count, 'example')} are too few to tell (at least 10)." in found.evidence


def test_nothing_scored_is_answered():
    assert convergence([], {}).passed is None
    assert convergence([ExampleScore(1, 1.0)] * 20, {}).passed is None
    assert validation([], []).passed is None


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_runs_of_hardly_a_step_are_answered(steps):
    before, after = scored(-0.1)
    found = convergence(before, {steps: after}, losses=[1.0] * steps)
    assert found.passed is True
    assert ("Training loss" in found.evidence) == (steps > 1)


def test_a_gain_that_was_lost_again_is_no_convergence():
    before, best = scored(-0.4)
    worse = [ExampleScore(s.num_targets, s.nll_sum_nats + 0.2 * s.num_targets) for s in best]
    found = convergence(before, {30: best, 60: worse})
    assert found.passed is False
    assert ": 0.200 above step 30, beyond the noise of the examples." in found.evidence
    assert convergence(before, {30: worse, 60: best}).passed is True
    nearly = [ExampleScore(s.num_targets, s.nll_sum_nats + 1e-3 * n) for n, s in enumerate(best)]
    mixed = [
        replace(s, nll_sum_nats=s.nll_sum_nats * (1 + 0.05 * (-1) ** n))
        for n, s in enumerate(nearly)
    ]
    assert convergence(before, {30: best, 60: mixed}).passed is True


def test_a_long_curve_is_shown_by_six_points_and_judged_by_all():
    before, after = scored(-0.4)
    found = convergence(before, dict.fromkeys(range(1, 100), after))
    assert found.evidence.partition(" (")[0].count("->") == 5


def test_no_change_passes_or_fails_about_as_often_as_the_interval_says():
    """A false verdict of either kind, a few times in a hundred."""
    told = [change(*scored(0.0, count=20, seed=seed)).fell for seed in range(400)]
    assert 5 <= sum(fell is not None for fell in told) <= 40


BASE = [ExampleScore(10, 20.0), *[ExampleScore(30, 45.0)] * 10]


def test_lower_perplexity_is_an_improvement():
    tuned = [ExampleScore(10, 20.5), *[ExampleScore(30, 40.0)] * 10]
    found = validation(BASE, tuned)
    assert found.passed is True
    # 470 and 420.5 nats over 310 tokens.
    assert found.evidence == (
        "Perplexity 4.555 -> 3.882 (-14.8%) on 11 held-out examples, 310 tokens; better on 10 of "
        "them."
    )


def test_a_loss_beyond_the_largest_perplexity_is_judged_by_itself():
    before = [ExampleScore(10, 8000.0 + n) for n in range(20)]
    after = [ExampleScore(10, 7500.0 + 2 * n) for n in range(20)]
    found = validation(before, after)
    assert found.passed is True
    assert found.evidence.startswith("Perplexity above 1e308 -> above 1e308 (-100.0%) on 20 held")
    back = validation([ExampleScore(10, 1.0)] * 20, before)
    assert back.passed is False
    assert "Perplexity 1.105 -> above 1e308 on 20 held-out" in back.evidence
    assert convergence(before, {1: after}).passed is True


def test_scores_of_different_sets_cannot_be_compared():
    with pytest.raises(ValueError, match="zip"):
        validation(BASE, BASE[:1])


def test_efficiency_is_against_full_fine_tuning():
    found = efficiency(Parameters(trainable=39_976_960, base=6_738_415_616))
    assert found.passed is True
    assert found.evidence == (
        "39,976,960 parameters train, 0.59% of the 6,738,415,616 of full fine-tuning."
    )
    assert efficiency(Parameters(trainable=10, base=100)).passed is False
    assert efficiency(Parameters(trainable=9, base=100)).passed is True


def repeat(name: str, *, sha: str = "ab" * 32, losses=(2.0, 1.0), final: float = 1.5) -> Repeat:
    return Repeat(name, sha, tuple(losses), final)


THIS = repeat("this run")


def test_without_another_run_nothing_is_known():
    found = reproducibility(THIS, others=[])
    assert found.passed is None
    assert "run it again" in found.evidence


def test_bit_identical_runs_reproduce():
    found = reproducibility(THIS, others=[repeat("one"), repeat("two")])
    assert found.passed is True
    assert found.evidence == (
        "Bit-identical adapter and losses in 2 earlier run(s) of this signature "
        "(sha256 abababababab), latest two."
    )


@pytest.mark.parametrize(
    ("other", "passed", "gap"),
    [
        (repeat("one", sha="cd" * 32, final=1.5 * 1.0005), True, "5.00e-04"),
        (repeat("one", losses=(2.0, 1.1)), True, "0.00e+00"),
        (repeat("one", sha="cd" * 32, final=1.5 * 1.01), False, "1.00e-02"),
        (repeat("one", sha="cd" * 32, final=1.5 * 0.99), False, "1.00e-02"),
    ],
)
def test_runs_that_differ_are_judged_by_their_validation_loss(other, passed, gap):
    found = reproducibility(THIS, others=[repeat("same"), other])
    assert found.passed is passed
    assert found.evidence == (
        "1 of 2 earlier run(s) of this signature are bit-identical; "
        f"validation losses differ by at most {gap} relative."
    )


def test_repeats_without_any_loss_are_compared_too():
    same = [repeat("one", sha="cd" * 32, final=0.0)]
    assert reproducibility(repeat("this run", final=0.0), others=same).passed is True


def test_a_run_that_is_not_a_number_does_not_reproduce():
    other = repeat("one", sha="cd" * 32, final=float("nan"))
    assert reproducibility(THIS, others=[other]).passed is False


def test_a_criterion_is_plain_data():
    assert asdict(efficiency(Parameters(1, 100))) == {
        "passed": True,
        "evidence": "1 parameters train, 1.00% of the 100 of full fine-tuning.",
    }
