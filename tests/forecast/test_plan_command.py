"""``loracle plan``, ``--fit`` and ``doctor --calibrate``, as a person types them."""

import json
import re
from pathlib import Path

import pytest

from geometries import UNUSUAL
from runs_fixture import load, settings

SMALL = settings(
    train__micro_batch_tokens=1024, eval__generate_batch_size=2, eval__max_new_tokens=4
)


def test_a_run_is_planned_without_weights_or_network(place, shallow):
    shallow(3)
    outcome = place.loracle("plan", "demo", *SMALL, "--gpu", "t4")
    assert outcome.code == 0, outcome.err
    assert "demo: smollm2-135m on alpaca-demo, 60 steps of 8 examples, for t4" in outcome.out
    assert "all-linear" in outcome.out
    assert f"{4_884_480 // 10:,}" in outcome.out
    assert "rough: 37% of the vendor's rate" in " ".join(outcome.out.split())
    assert "validation: " in outcome.out
    assert "The largest peak: " in outcome.out
    assert outcome.err == ""


def test_a_study_is_planned_arm_by_arm(place, shallow, study):
    shallow(3)
    outcome = place.loracle("plan", study, "--gpu", "l4", "--markdown")
    assert outcome.code == 0, outcome.err
    rows = [line for line in outcome.out.splitlines() if line.startswith("| ")]
    assert len([row for row in rows if row.startswith("| last-third ")]) == 2
    assert "All 6 runs, one after another: " in outcome.out
    assert "strategic: its modules are chosen when the study runs" in outcome.out


def test_a_model_whose_rows_would_leak_is_refused_in_one_line(place, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(UNUSUAL["falcon_h1"]), encoding="utf-8")
    outcome = place.loracle("plan", place.config, *settings(model=f"path:{tmp_path}"))
    assert outcome.code == 2
    assert "FalconH1ForCausalLM: sequences that share a row change each other's" in outcome.line


def test_what_does_not_fit_is_told_what_would(place, shallow):
    shallow(2)
    words = settings(model="tinyllama-1.1b", data__source="alpaca")
    outcome = place.loracle("plan", *words, *SMALL, "--gpu", "1.15GiB", "--markdown")
    assert outcome.code == 0, outcome.err
    assert "It fits with: --set " in outcome.out
    assert re.search(r"\| all-linear \|.*\| no \|", outcome.out)
    assert re.search(r"\| as given \| \d\.\d\d \| n/a \|\n\| [\w.]+=\w+ \|", outcome.out)


def test_a_plan_of_what_fits_says_what_it_changed(place, shallow):
    shallow(2)
    words = [*settings(model="tinyllama-1.1b", data__source="alpaca"), *SMALL, "--fit"]
    outcome = place.loracle("plan", *words, "--gpu", "1.15GiB", "--markdown")
    assert outcome.code == 0, outcome.err
    assert "Fitted with: --set " in outcome.out
    assert "What each setting does to all-linear" in outcome.out
    assert re.search(r"\| all-linear \|.*\| yes \|", outcome.out)
    roomy = place.loracle("plan", *words, "--gpu", "h100")
    assert "Everything fits as configured." in roomy.out
    assert "What each setting does" not in roomy.out


def test_an_unknown_gpu_is_one_line(place):
    outcome = place.loracle("plan", "demo", "--gpu", "a100")
    assert outcome.code == 2
    assert outcome.line == (
        "UsageError: --gpu: no device 'a100' (known: t4, l4, rtx4090, a100-40, a100-80, h100, "
        "h200; or its memory, e.g. 24GiB); did you mean 'a100-40'?"
    )


def test_a_run_is_fitted_and_says_so(place, tmp_path, monkeypatch):
    from loracle.forecast.devices import Device
    from loracle.forecast.fit import value_in_yaml

    tiny = Device("a small machine", 0.0013, has_bf16=True, is_gpu=False)
    monkeypatch.setattr("loracle.forecast.target.this_device", lambda: tiny)
    short = settings(
        train__max_steps=2, train__micro_batch_tokens=512, lora__dropout=0,
        lora__placement="attention-qv", measure__latency_trials=0, eval__every_steps=0,
        eval__batch_tokens=512, eval__max_new_tokens=2, eval__generate_batch_size=1,
        eval__generate_examples=1, data__max_tokens=64,
    )  # fmt: skip
    outcome = place.baseline("--out", tmp_path / "run", *short, "--fit")
    assert outcome.code == 0, outcome.err
    assert "fit to a small machine" in outcome.err
    note = load(tmp_path / "run" / "environment.json")["engine"]["fit"]
    assert note["changes"]
    assert note["predicted_peak_gib"] <= 0.0013
    config = (tmp_path / "run" / "config.yaml").read_text()
    for key, value in note["changes"].items():
        assert f"{key.rpartition('.')[2]}: {value_in_yaml(value)}" in config


def test_a_run_that_cannot_be_fitted_is_refused_early(place, tmp_path, monkeypatch):
    from loracle.forecast.devices import Device

    tiny = Device("a tiny machine", 0.0001, has_bf16=True, is_gpu=False)
    monkeypatch.setattr("loracle.forecast.target.this_device", lambda: tiny)
    words = settings(
        lora__placement="attention-qv", lora__dropout=0, train__batch_size=2,
        train__micro_batch_tokens=512, eval__generate_batch_size=1, eval__max_new_tokens=2,
    )  # fmt: skip
    outcome = place.baseline("--out", tmp_path / "run", *words, "--fit")
    assert outcome.code == 2
    assert "does not fit a tiny machine" in outcome.line
    assert not (tmp_path / "run").exists()


def test_packing_cannot_be_what_fits_where_it_cannot_run(place):
    """A CPU's memory is not what 4 bits are for; nothing is proposed that was not asked for."""
    from loracle.forecast.devices import Device
    from loracle.forecast.fit import candidates
    from loracle.study.forecast import planned_arms

    arms = planned_arms("demo", overrides=[])
    cpu = Device("a cpu", 4, has_bf16=True, is_gpu=False)
    assert all("quantization" not in each for each in candidates(arms, device=cpu))


def test_the_doctor_says_whether_speed_was_measured(place, monkeypatch):
    outcome = place.loracle("doctor")
    assert outcome.code == 0
    assert "loracle doctor --calibrate" in outcome.out


def test_the_doctor_measures_it(place, tmp_path, monkeypatch):
    from loracle.forecast import calibration

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    monkeypatch.setitem(calibration._SIZES, "cpu", size)
    monkeypatch.setattr(calibration, "_ADDED", 1 << 16)
    outcome = place.loracle("doctor", "--calibrate")
    assert outcome.code == 0, outcome.err
    assert "a call, measured 2" in " ".join(outcome.out.split())
    # What was measured here is of no use to the tests after this one.
    for path in (place.home / ".cache" / "loracle" / "calibration").iterdir():
        path.unlink()


@pytest.mark.slow
def test_the_plans_that_are_kept_are_what_the_command_says(place):
    """Of one row of another kept plan, test_predict says so in the fast suite too."""
    words = settings(train__max_steps=1000, model="llama-2-7b", data__source="alpaca")
    outcome = place.loracle("plan", "placement_study", *words, "--gpu", "l4", "--fit", "--markdown")
    assert outcome.code == 0, outcome.err
    assert outcome.out == Path("docs/plans/llama-2-7b-l4.md").read_text(encoding="utf-8")
