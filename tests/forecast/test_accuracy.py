"""How near a plan came is kept with a study and shown with its errors."""

from dataclasses import replace

import pytest

from analysis.stats.simulated import ARMS, write_study
from loracle.records.files import strict_json, write_durably
from loracle.records.names import CLOCK
from loracle.records.predictions import ArmAccuracy, keep_accuracy, kept_accuracy
from loracle.records.study_folder import read_study
from loracle.report.tables.predicted import predicted_table
from loracle.study.accuracy import _lengths

ONE = ArmAccuracy("all-linear", 1.02, 1.0, "tensors", 4.5, 5.0, "2026-11-24")
OTHER = ArmAccuracy("attention", 0.97, 1.0, "tensors", None, 4.0, None)


def test_errors_are_relative_to_what_was_measured():
    assert ONE.memory_error_frac == pytest.approx(0.02)
    assert ONE.time_error_frac == pytest.approx(-0.1)
    assert OTHER.time_error_frac is None


def test_it_is_kept_with_the_study_and_shown(tmp_path):
    folder = write_study(tmp_path, arms=ARMS[:2])
    assert kept_accuracy(folder) == []
    assert predicted_table(read_study(folder)) is None
    keep_accuracy(folder, [ONE, OTHER])
    assert kept_accuracy(folder) == [ONE, OTHER]
    table = predicted_table(read_study(folder))
    assert table.rows[0] == ("all-linear", "1.020", "1.000", "+2.0", "4.500", "5.000", "-10.0")
    assert table.rows[1][-3:] == ("n/a", "4.000", "n/a")
    assert "error of memory: median 2.5 %, at most 3.0 % of 2 arms" in table.caption
    assert "speed as measured on 2026-11-24" in table.caption
    assert "error of time: median 10.0 %, at most 10.0 % of 1 arm" in table.caption


def test_ratios_stand_beside_those_of_steps_taken_in_turn(tmp_path):
    folder = write_study(tmp_path, arms=ARMS[:3])
    kept = [ONE, OTHER, replace(ONE, arm=ARMS[2].name, predicted_step_s=3.6)]
    keep_accuracy(folder, kept)
    times = {"all-linear": [4.0, 6.0, 5.0], ARMS[2].name: [3.0, 4.2, 3.5]}
    clock = {"schema": 1, "rounds": 3, "environment": {}, "step_time_s": times}
    write_durably(folder / CLOCK, strict_json(clock, origin=CLOCK).encode())
    table = predicted_table(read_study(folder))
    assert table.columns[-1].unit == "times all-linear"
    assert [row[-2:] for row in table.rows] == [("1.00", "1.00"), ("n/a", "n/a"), ("0.80", "0.70")]
    assert "took steps in turn" in table.caption


def test_a_step_is_traced_with_examples_that_come_to_its_tokens():
    lengths = _lengths({"num_tokens": 103, "num_targets": 70}, count=4)
    assert len(lengths) == 4
    assert sum(prompt + response for prompt, response in lengths) == 103
    assert sum(response for _, response in lengths) == 70
    assert min(prompt for prompt, _ in lengths) >= 1
