"""Simulated studies are what they say: tests of statistics and reports stand on them."""

import numpy as np
import pytest

from analysis.stats.simulated import ARMS, Noise, SimulatedArm, simulated_study, write_study


def contents(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_same_arguments_write_the_same_bytes(tmp_path):
    first, again, other = (
        contents(write_study(tmp_path / name, arms=ARMS[:2], num_examples=5, draw_seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert first != other


def test_without_noise_an_arm_differs_by_its_effect_exactly(tmp_path):
    none = Noise(seed=0, example=0, both=0)
    study = simulated_study(tmp_path, arms=ARMS[:2], noise=none, num_examples=8)
    ours, theirs = (
        study.runs_of(arm.name)[0].result.quality.tuned.loss_nats_per_token for arm in ARMS[1::-1]
    )
    assert ours - theirs == pytest.approx(ARMS[1].effect_nats)


def test_losses_of_results_evaluations_and_examples_agree(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:1], num_examples=8, num_answers=3)
    for run in study.runs:
        total = np.sum([row["nll_sum_nats"] for row in run.examples])
        tokens = sum(row["tokens"] for row in run.examples)
        loss = run.result.quality.tuned.loss_nats_per_token
        assert loss == pytest.approx(total / tokens)
        assert run.evals[-1]["loss_nats_per_token"] == loss
        assert [row["generated"] is None for row in run.examples] == [False] * 3 + [True] * 5
        assert len(run.steps) == 30


def test_full_fine_tuning_has_no_modules_and_no_rank(tmp_path):
    arms = (ARMS[0], SimulatedArm("full", -0.01, is_full=True))
    study = simulated_study(tmp_path, arms=arms, num_examples=5, num_layers=3)
    full = study.arm("full")
    assert (full.rank, full.alpha, full.modules, full.placement) == (None, None, (), "full")
    assert full.trainable_params > study.arm("all-linear").trainable_params


def test_failed_runs_are_unfinished_and_say_why(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:2], unfinished=[("attention", 1)])
    (failed,) = study.unfinished
    assert (failed["arm"], failed["seed"], failed["status"]) == ("attention", 1, "failed")
    assert failed["error"] == "step 7: the loss is nan"
    assert len(study.runs) == 2 * 3 - 1 + 1 + 2
