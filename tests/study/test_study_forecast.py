"""The time of a study: that of `loracle plan`, corrected by runs that are finished."""

import json

import pytest
import torch

from loracle.forecast.calibration import Calibration, write_calibration
from loracle.forecast.devices import this_device
from loracle.forecast.predict import dtype_on
from loracle.forecast.target import target_of
from loracle.study.file import load_study
from loracle.study.forecast import estimate_time, make_plan
from loracle.study.run import prepare_study

STUDY = """\
question: How long?
base: {base}
reference: all-linear
budget: equal-parameters
seeds: [0, 1]
arms:
  all-linear:
  last-third:
"""


@pytest.fixture(scope="module")
def file(place):
    path = place.work / "timed_study.yaml"
    path.write_text(STUDY.format(base=place.config), encoding="utf-8")
    return path


@pytest.fixture
def plan(place, file):
    with place.entered():
        study, base = load_study(file)
        yield prepare_study(study, base=base, name="timed_study", out=place.work / "none")


@pytest.fixture
def calibrated(plan, tmp_path, monkeypatch):
    """Makes this machine's speed known, in a cache of its own."""
    device = this_device()
    dtype = str(dtype_on(device, requested=plan.base.dtype)).removeprefix("torch.")
    monkeypatch.setattr("loracle.forecast.calibration.cache_folder", lambda: tmp_path / "cache")
    write_calibration(
        Calibration(
            device=device.name,
            dtype=dtype,
            threads=torch.get_num_threads(),
            flop_per_s=1e11,
            byte_per_s=1e10,
            overhead_s=1e-6,
            factor=1.5,
            measured_at="2026-01-01",
            torch="2",
        )
    )


def finish(folder, *, seconds):
    folder.mkdir(parents=True)
    started, finished = "2026-01-01T00:00:00+00:00", f"2026-01-01T00:{seconds // 60:02}:00+00:00"
    (folder / "environment.json").write_text(json.dumps({"captured_at": started}))
    (folder / "result.json").write_text(json.dumps({"finished_at": finished}))


def test_times_are_those_of_the_forecast(plan, file, calibrated, tmp_path):
    estimate = estimate_time(plan, out=tmp_path)
    report = make_plan(str(file))
    assert estimate.seconds_by_arm == {
        name: prediction.times.run_s for name, prediction in report.predictions.items()
    }
    assert estimate.seconds_left == pytest.approx(2 * sum(estimate.seconds_by_arm.values()))
    assert estimate.seconds_by_arm["last-third"] < estimate.seconds_by_arm["all-linear"]
    assert "4 runs one after another (traced; measured on this machine, 2026-01-01)" in (
        estimate.words()
    )


def test_finished_runs_set_the_pace(plan, calibrated, tmp_path):
    traced = estimate_time(plan, out=tmp_path).seconds_by_arm
    finish(tmp_path / "runs" / plan.runs[0].id, seconds=600)
    paced = estimate_time(plan, out=tmp_path)
    seconds = paced.seconds_by_arm
    assert len(paced.arms_left) == 3
    assert seconds["all-linear"] == pytest.approx(600)
    ratio = traced["last-third"] / traced["all-linear"]
    assert seconds["last-third"] == pytest.approx(600 * ratio)
    assert paced.seconds_left == pytest.approx(600 + 2 * seconds["last-third"])
    assert "at the pace of 1 finished run" in paced.words()


def test_an_unknown_speed_gives_no_time_until_a_run_is_finished(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("loracle.forecast.calibration.cache_folder", lambda: tmp_path / "empty")
    if target_of(None, config=plan.base).rates is not None:
        pytest.skip("this device's speed is in the table")
    unknown = estimate_time(plan, out=tmp_path)
    assert unknown.seconds_by_arm == {}
    assert unknown.words() == "speed not known; measure it with: loracle doctor --calibrate"
    finish(tmp_path / "runs" / plan.runs[0].id, seconds=600)
    paced = estimate_time(plan, out=tmp_path)
    assert paced.seconds_by_arm["all-linear"] == pytest.approx(600)
    assert 0 < paced.seconds_by_arm["last-third"] < 600
    assert "at the pace of 1 finished run" in paced.words()


def test_a_finished_study_has_nothing_left(plan, tmp_path):
    for run in plan.runs:
        finish(tmp_path / "runs" / run.id, seconds=60)
    assert estimate_time(plan, out=tmp_path).words() == "nothing left to run"
