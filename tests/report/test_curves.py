"""The numbers behind the loss panels, against hand-made steps."""

import json

import numpy as np
import pytest

from analysis.stats.simulated import ARMS, simulated_study
from loracle.report.figures.curves import loss_curves, validation_curves


def write_losses(study, losses):
    """Overwrites the steps of runs: (arm, seed) -> losses."""
    for run in study.runs:
        if run.role == "arm":
            rows = [
                {"step": n, "loss_nats_per_token": float(loss)}
                for n, loss in enumerate(losses[run.arm, run.seed], 1)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (run.path / "steps.jsonl").write_text(lines)


@pytest.fixture
def two_arms(tmp_path):
    return simulated_study(tmp_path, arms=ARMS[:2], seeds=(0, 1), num_answers=0, repeats=0)


def test_lines_are_running_means_over_steps_then_means_over_seeds(two_arms):
    ramp = np.arange(1.0, 25.0)  # a window of 3 leaves the inside of a ramp as it is
    write_losses(
        two_arms,
        {
            ("all-linear", 0): ramp,
            ("all-linear", 1): ramp + 2,
            ("attention", 0): ramp,
            ("attention", 1): ramp,
        },
    )
    curves = loss_curves(two_arms)
    assert curves.window_steps == 3
    rows = {(row["arm"], row["step"]): row for row in curves.smooth}
    inside = rows["all-linear", 10]
    assert (inside["low"], inside["loss"], inside["high"]) == pytest.approx((10, 11, 12))
    assert rows["all-linear", 1]["loss"] == pytest.approx(1.5 + 1)
    assert rows["all-linear", 24]["loss"] == pytest.approx(23.5 + 1)


def test_the_gap_removes_what_arms_share(two_arms):
    noise = np.random.default_rng(0).normal(0, 1, (2, 24))
    write_losses(
        two_arms,
        {("all-linear", seed): noise[seed] for seed in (0, 1)}
        | {("attention", seed): noise[seed] + 0.25 for seed in (0, 1)},
    )
    gaps = loss_curves(two_arms).gaps
    assert {row["arm"] for row in gaps} == {"attention"}
    assert all(row["loss"] == pytest.approx(0.25) for row in gaps)
    assert all(row["seeds"] == 2 for row in gaps)


def test_a_long_run_is_drawn_with_few_points_and_its_last_step(two_arms):
    steps = np.linspace(2, 1, 1000)
    write_losses(
        two_arms, {(arm, seed): steps for arm in ("all-linear", "attention") for seed in (0, 1)}
    )
    curves = loss_curves(two_arms)
    drawn = [row["step"] for row in curves.smooth if row["arm"] == "attention"]
    assert len(drawn) <= 121
    assert drawn[0] == 1
    assert drawn[-1] == 1000
    raw = [row for row in curves.raw if row["arm"] == "attention"]
    assert np.mean([row["loss"] for row in raw[:-1]]) == pytest.approx(1.5, abs=0.01)
    assert raw[0]["step"] == (1 + curves.stride_steps) / 2


def test_without_a_recorded_step_there_is_no_curve(two_arms):
    for run in two_arms.runs:
        (run.path / "steps.jsonl").unlink()
    assert loss_curves(two_arms) is None


def test_validations_leave_the_untuned_model_out(two_arms):
    rows = validation_curves(two_arms)
    assert {row["step"] for row in rows} == {15, 30}
    final = {row["arm"]: row["loss"] for row in rows if row["step"] == 30}
    for arm in ("all-linear", "attention"):
        runs = two_arms.runs_of(arm).values()
        losses = [run.result.quality.tuned.loss_nats_per_token for run in runs]
        assert final[arm] == pytest.approx(np.mean(losses))
