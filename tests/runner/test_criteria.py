"""Each criterion says true, false or nothing, and its evidence holds the figures."""

import random
from dataclasses import asdict

import pytest

from loracle.engine.evaluate import ExampleScore
from loracle.engine.measure import Parameters
from loracle.runner.criteria import (
    Repeat,
    convergence,
    efficiency,
    reproducibility,
    validation,
)


def noisy(trend: float, *, count: int = 100, noise: float = 0.1, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [2 + trend * step / count + draw.gauss(0, noise) for step in range(count)]


def test_a_falling_loss_converges():
    found = convergence(noisy(-1.0))
    assert found.passed is True
    assert found.evidence.startswith("Training loss by fifths of 100 steps: 1.888 -> 1.700 -> ")
    assert "nats per token (fell by 0.795, standard error 0.039)." in found.evidence


@pytest.mark.parametrize("trend", [0.0, 1.0])
def test_a_flat_or_rising_loss_does_not(trend):
    found = convergence(noisy(trend))
    assert found.passed is False
    assert "fell by" in found.evidence


def test_a_fall_within_the_noise_does_not_count():
    assert convergence(noisy(-0.05, noise=0.5)).passed is False
    assert convergence(noisy(-0.05, noise=0.001)).passed is True


def test_flat_losses_pass_about_as_often_as_two_standard_errors_say():
    """One-sided: a fall by chance beyond two standard errors, a few times in a hundred."""
    passed = sum(convergence(noisy(0.0, seed=seed)).passed for seed in range(400))
    assert 1 <= passed <= 25


def test_a_last_fall_that_the_trend_contradicts_does_not_count():
    losses = [2.0] * 20 + [3.0] * 20 + [4.0] * 20 + [5.0] * 20 + [1.9] * 20
    assert convergence(losses).passed is False


def test_the_fifths_cover_every_step():
    # 13 steps: four fifths of two steps, the last of five.
    found = convergence([5.0] * 9 + [1.0] * 4)
    assert "5.000 -> 5.000 -> 5.000 -> 5.000 -> 1.800 nats" in found.evidence


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_steps_tell_nothing(count):
    found = convergence([1.0] * count)
    assert found.passed is None
    assert found.evidence == f"{count} steps are too few to tell (at least 10)."


def test_ten_steps_tell_something():
    assert convergence([2.0 - 0.1 * step for step in range(10)]).passed is True


BASE = [ExampleScore(10, 20.0), ExampleScore(30, 45.0)]


def test_lower_perplexity_is_an_improvement():
    tuned = [ExampleScore(10, 15.0), ExampleScore(30, 45.5)]
    found = validation(BASE, tuned)
    assert found.passed is True
    # 65 and 60.5 nats over 40 tokens.
    assert found.evidence == (
        "Perplexity 5.078 -> 4.538 (-10.6%) on 2 held-out examples, 40 tokens; better on 1 of them."
    )


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_equal_or_higher_perplexity_is_not(shift):
    tuned = [ExampleScore(score.num_targets, score.nll_sum_nats + shift) for score in BASE]
    found = validation(BASE, tuned)
    assert found.passed is False
    assert "better on 0 of them" in found.evidence


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


def test_a_run_that_is_not_a_number_does_not_reproduce():
    other = repeat("one", sha="cd" * 32, final=float("nan"))
    assert reproducibility(THIS, others=[other]).passed is False


def test_a_criterion_is_plain_data():
    assert asdict(efficiency(Parameters(1, 100))) == {
        "passed": True,
        "evidence": "1 parameters train, 1.00% of the 100 of full fine-tuning.",
    }
