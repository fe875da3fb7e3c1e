"""Arms are clocked in turn, on the same batches, and compared round by round."""

from dataclasses import replace

import pytest

from analysis.stats.simulated import ARMS, write_study
from loracle.analysis.costs import arm_costs, ratio_range, step_in_turn
from loracle.records.study_folder import StudyClock, read_study
from runs_fixture import contents, load, settings

STUDY = """\
question: Which is faster?
base: {base}
config:
  train: {{max_steps: 2}}
  eval: {{every_steps: 0, generate_examples: 0}}
  measure: {{skip_steps: 1, latency_trials: 0, clock_rounds: 3}}
  audit: {{reload_examples: 2}}
reference: all-linear
budget: equal-rank
seeds: [0]
interval: null
arms:
  all-linear:
  last-1:
  attention-qv:
"""


@pytest.fixture(scope="module")
def file(place):
    path = place.work / "clocked_study.yaml"
    path.write_text(STUDY.format(base=place.config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def clocked(place, file):
    folder = place.work / "studies" / "clocked"
    outcome = place.loracle("study", file, "--out", folder)
    assert outcome.code == 0, outcome.err
    return folder, outcome


def test_every_arm_has_a_time_for_every_round(clocked):
    folder, outcome = clocked
    kept = load(folder / "clock.json")
    assert "clock the arms in turn" in outcome.err
    assert list(kept["step_time_s"]) == ["all-linear", "last-1", "attention-qv"]
    assert {len(times) for times in kept["step_time_s"].values()} == {3}
    assert all(time > 0 for times in kept["step_time_s"].values() for time in times)
    first = load(folder / "plan.json")["runs"][0]["id"]
    assert (
        kept["environment"]["device"]
        == load(folder / "runs" / first / "environment.json")["device"]
    )


def test_the_report_says_how_times_were_taken(clocked):
    folder, _ = clocked
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "arms in turn over the same 3 batches, as a ratio to all-linear" in page


def test_a_study_that_goes_on_is_not_clocked_again(place, file, clocked):
    folder, _ = clocked
    before = contents(folder)["clock.json"]
    outcome = place.loracle("study", file, "--out", folder)
    assert outcome.code == 0, outcome.err
    assert contents(folder)["clock.json"] == before


def test_it_can_be_left_out_without_making_other_runs_of_them(place, file, tmp_path, clocked):
    folder, _ = clocked
    words = settings(measure__clock_rounds=0)
    outcome = place.loracle("study", file, "--out", tmp_path / "study", *words)
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "study" / "clock.json").exists()
    ours, theirs = (
        [run["id"] for run in load(path / "plan.json")["runs"]]
        for path in (tmp_path / "study", folder)
    )
    assert ours == theirs


def test_times_are_compared_round_by_round(tmp_path):
    study = read_study(write_study(tmp_path, arms=ARMS[:3]))
    names = [arm.name for arm in study.arms]
    reference, other, third = study.reference, *[n for n in names if n != study.reference][:2]
    # A machine that gets three times as slow: the ratio stays.
    clock = StudyClock({reference: (2.0, 4.0, 6.0), other: (1.0, 2.0, 3.0)})
    timed = replace(study, clock=clock)
    cost = step_in_turn(timed, other)
    assert (cost.median, cost.low, cost.high) == (2.0, 2.0, 2.0)
    assert ratio_range(cost, step_in_turn(timed, reference)) == (0.5, 0.5)
    own = step_in_turn(timed, reference)
    assert (own.median, own.low, own.high) == (4.0, 4.0, 4.0)
    assert arm_costs(timed, other)["step_time_s"] == cost
    # An arm that was not clocked keeps what its runs measured.
    assert step_in_turn(timed, third) is None
    assert arm_costs(timed, third).get("step_time_s") == arm_costs(study, third).get("step_time_s")


def test_an_arm_with_a_slow_minute_keeps_its_median(tmp_path):
    study = read_study(write_study(tmp_path, arms=ARMS[:2]))
    other = next(arm.name for arm in study.arms if arm.name != study.reference)
    clock = StudyClock({study.reference: (2.0,) * 5, other: (1.0, 1.0, 9.0, 1.0, 1.1)})
    cost = step_in_turn(replace(study, clock=clock), other)
    assert cost.median == 1.0
    assert cost.high == pytest.approx(1.1)


def test_a_single_round_has_no_quartiles_but_its_ratio(tmp_path):
    study = read_study(write_study(tmp_path, arms=ARMS[:2]))
    other = next(arm.name for arm in study.arms if arm.name != study.reference)
    cost = step_in_turn(
        replace(study, clock=StudyClock({study.reference: (2.0,), other: (1.0,)})), other
    )
    assert (cost.low, cost.median, cost.high) == (1.0, 1.0, 1.0)
