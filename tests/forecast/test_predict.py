"""Predictions for devices: what fits, what it rests on, and what nobody measured is not given."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from loracle.config.files import load_config
from loracle.errors import UsageError
from loracle.forecast import cases
from loracle.forecast.calibration import (
    Calibration,
    calibrate,
    read_calibration,
    write_calibration,
)
from loracle.forecast.cases import predict_arms
from loracle.forecast.devices import DEVICES, Device, device_of, this_device
from loracle.forecast.fit import candidates, changed, find_fit, profile_of
from loracle.forecast.lengths import lengths_of
from loracle.forecast.predict import PhaseMemory, dtype_on, runtime_gib
from loracle.forecast.target import target_of
from loracle.report.terminal.forecast import plan_report_markdown
from loracle.sources import catalog
from loracle.study.forecast import PlanReport, choose_fit, make_plan, planned_arms

LLAMA = ["model=llama-2-7b", "data.source=alpaca"]
# Fewer layers are quicker to trace, and the logic is the same.
TINY_LLAMA = ["model=tinyllama-1.1b", "data.source=alpaca"]
SMALL = ["eval.generate_batch_size=2", "eval.max_new_tokens=4"]
# With which few settings have to be tried.
PASSES = ["train.micro_batch_tokens=1024", "eval.batch_tokens=1024"]
KEPT = Path(__file__).parents[2] / "docs" / "plans" / "llama-2-7b-h100.md"


@pytest.fixture(scope="module")
def llama():
    """Llama-2-7B with adapters everywhere on an H100, all 32 layers of it, as in the kept plan."""
    words = [*LLAMA, "train.max_steps=1000"]
    arms = planned_arms("placement_study", overrides=words)
    target = target_of("h100", config=arms.config)
    found = predict_arms(arms, device=target.device, rates=target.rates, only=["all-linear"])
    arms = replace(arms, plans=_one(arms.plans), num_runs=_one(arms.num_runs))
    return PlanReport(arms, target, lengths_of(arms.config), found)


def _one(arms):
    return {"all-linear": arms["all-linear"]}


def test_the_kept_plan_of_llama_2_7b_is_what_is_predicted(llama):
    kept = KEPT.read_text(encoding="utf-8").splitlines()
    said = plan_report_markdown(llama).splitlines()
    rows = [line for line in said if line.startswith("| all-linear ")]
    assert len(rows) == 2
    assert set(rows) <= set(kept)
    assert said[:2] == kept[:2]


def test_llama_2_7b_is_predicted_by_part(llama):
    """Weights and adapters are the closed form, whatever the trace does."""
    (found,) = llama.predictions.values()
    parts = found.memory["train"].parts
    assert found.plan.trainable_params == 39_976_960
    assert parts["weights"] == pytest.approx(2 * 6_738_415_616 / 2**30, rel=0.001)
    assert parts["adapters"] == pytest.approx(4 * 39_976_960 / 2**30, rel=0.001)
    assert parts["optimizer"] == pytest.approx(8 * 39_976_960 / 2**30, rel=0.01)
    assert parts["activations"] > 1
    assert found.memory["train"].runtime_gib == runtime_gib(DEVICES["h100"]) > 0
    assert found.memory["generate"].total_gib > 12.5
    assert found.fits
    assert found.times is not None
    assert 0 < found.times.step_s < found.times.epoch_s < found.times.epoch_s * 8


def test_one_process_predicts_what_forked_ones_do(shallow, study, monkeypatch):
    """On a GPU machine nothing is forked: CUDA and autograd's threads would not survive it."""
    shallow(3)
    arms = planned_arms(study, overrides=[])
    two = ["all-linear", "last-third"]
    forks = []
    pool = cases.ProcessPoolExecutor
    monkeypatch.setattr(
        cases, "ProcessPoolExecutor", lambda *a, **k: forks.append(a) or pool(*a, **k)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    target = target_of("t4", config=arms.config)
    predict = partial(
        predict_arms, arms, device=target.device, rates=target.rates, only=two, only_times=True
    )
    forked = predict()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert predict() == forked
    assert len(forks) == 1


def peaks_of(config, *, device, layers, shallow):
    """The peak of each phase of a Llama-2-7B of so many layers."""
    shallow(layers)
    arms = replace(planned_arms("base_config", overrides=LLAMA), config=config)
    (found,) = predict_arms(arms, device=device, rates=None).values()
    return {phase: memory.total_gib for phase, memory in found.memory.items()}, found


def at_32_layers(config, *, device, shallow):
    """The peaks of the whole model, from three and four layers: layers are alike."""
    (three, _), (four, found) = (
        peaks_of(config, device=device, layers=layers, shallow=shallow) for layers in (3, 4)
    )
    whole = {phase: four[phase] + 28 * (four[phase] - three[phase]) for phase in four}
    return whole, found


def test_memory_grows_by_the_same_with_every_layer(llama, shallow):
    config = llama.arms.config
    found, _ = at_32_layers(config, device=DEVICES["h100"], shallow=shallow)
    (whole,) = llama.predictions.values()
    for phase, memory in whole.memory.items():
        assert found[phase] == pytest.approx(memory.total_gib, rel=0.001), phase


def test_a_device_known_by_its_memory_has_no_times(shallow):
    shallow(2)
    report = make_plan("demo", overrides=SMALL, gpu="24GiB")
    (found,) = report.predictions.values()
    assert found.times is None
    assert "speed not known" in report.target.basis


@pytest.mark.parametrize(
    ("device", "asked", "dtype"),
    [
        ("t4", "auto", torch.float16),
        ("l4", "auto", torch.bfloat16),
        ("t4", "float32", torch.float32),
    ],
)
def test_the_dtype_is_what_the_device_multiplies(device, asked, dtype):
    assert dtype_on(device_of(device), requested=asked) == dtype


# The larger devices have the settings of the a100-40.
@pytest.mark.parametrize("name", ["t4", "l4", "rtx4090", "a100-40"])
def test_each_profile_of_llama_2_7b_fits_its_device(name, shallow):
    device = DEVICES[name]
    profile = profile_of("llama-2-7b", device)
    config = changed(load_config("base_config", overrides=LLAMA), profile)
    peaks, found = at_32_layers(config, device=device, shallow=shallow)
    whole = replace(found, memory={"train": PhaseMemory({"weights": max(peaks.values())}, 0.0)})
    assert whole.fits, peaks


def test_every_profile_is_one_of_the_table_s_devices():
    for entry in catalog().models.values():
        assert set(entry.profiles) <= set(DEVICES)


def test_less_memory_means_smaller_passes_then_checkpointing_then_four_bits(shallow):
    shallow(2)
    arms = planned_arms("base_config", overrides=["model=tinyllama-1.1b", *SMALL])
    steps = [dict(each) for each in candidates(arms, device=Device("a gpu", 10, has_bf16=True))]
    first = steps.index({"train.gradient_checkpointing": True})
    packed = next(place for place, each in enumerate(steps) if "quantization" in each)
    assert steps[0] == {}
    assert first < packed
    assert all("quantization" in each for each in steps[packed:])
    passes = ["train.micro_batch_tokens=2048", "eval.batch_tokens=1024"]
    arms = planned_arms("base_config", overrides=["model=tinyllama-1.1b", *passes, *SMALL])
    roomy, tight, small = (
        find_fit(arms, device=Device("a gpu", gib, has_bf16=True), rates=None)
        for gib in (20, 1.12, 1.05)
    )
    assert roomy.changes == {}
    assert tight.changes
    assert "quantization" not in tight.changes
    assert small.changes["quantization"] == "nf4"
    assert all(each.fits for each in small.predictions.values())
    # What it costs is told change by change, and ends at what was chosen.
    told = [step.setting for step in small.steps]
    assert told[:2] == ["", "quantization=nf4"]
    assert sorted(told[1:]) == sorted(small.overrides)
    assert small.steps[0].peak_gib > small.steps[1].peak_gib > small.peak_gib * 0.999
    assert small.steps[-1].peak_gib == small.peak_gib
    assert [len(each.steps) for each in (roomy, tight)] == [1, 1 + len(tight.changes)]


def test_predictions_that_are_there_are_not_made_again(shallow, study):
    shallow(3)
    arms = planned_arms(study, overrides=PASSES)
    two = {name: plan for name, plan in arms.plans.items() if name not in arms.stand_ins}
    arms = replace(arms, plans=two)
    roomy = Device("a gpu", 80, has_bf16=True)
    known = predict_arms(arms, device=roomy, rates=None)
    device = Device("a gpu", 0.76, has_bf16=True)
    known = {name: replace(each, capacity_gib=device.memory_gib) for name, each in known.items()}
    fresh, reused = (
        find_fit(arms, device=device, rates=None, known=given) for given in (None, known)
    )
    assert fresh == reused
    assert fresh.changes
    assert list(fresh.predictions) == list(arms.plans)
    assert fresh.steps[0].peak_gib == max(each.peak_gib for each in known.values())


def test_what_cannot_fit_says_which_device_would_hold_it(shallow):
    shallow(3)
    arms = planned_arms("base_config", overrides=[*LLAMA, "train.micro_batch_tokens=512"])
    with pytest.raises(UsageError, match=r"does not fit 1 GiB .* needs \d+\.\d GiB; t4 would hold"):
        find_fit(arms, device=device_of("1GiB"), rates=None)


def test_every_arm_of_a_study_gets_the_same_settings(shallow, study):
    shallow(3)
    choice = choose_fit(study, overrides=PASSES, gpu="0.76GiB")
    assert choice.overrides
    assert choice.notes["fit"]["predicted_peak_gib"] < 0.76
    assert "fit to 0.76 GiB" in choice.words
    report = make_plan(study, overrides=[*PASSES, *choice.overrides], gpu="0.76GiB")
    assert len(report.predictions) == 3
    assert all(each.fits for each in report.predictions.values())
    assert report.arms.stand_ins == ("strategic",)
    assert {each.micro_batch_tokens for each in report.predictions.values()} == {
        report.arms.config.train.micro_batch_tokens
    }


def test_packed_weights_take_a_quarter(shallow):
    """4 bits and a scale of 8 bits for every 64 numbers; head and embeddings stay."""
    shallow(2)
    words = [*TINY_LLAMA, *SMALL]
    plain = make_plan("base_config", overrides=words, gpu="h100")
    packed = make_plan("base_config", overrides=[*words, "quantization=nf4"], gpu="h100")
    ours, theirs = (
        next(iter(report.predictions.values())).memory["train"].parts["weights"]
        for report in (packed, plain)
    )
    linear = (1_100_048_384 - 2 * 32_000 * 2048 - 45 * 2048) // 22 * 2
    kept = theirs - 2 * linear / 2**30
    assert ours - kept == pytest.approx(linear * (0.5 + 1 / 64 + 4 / 64 / 256) / 2**30, rel=0.001)


def test_checkpointing_keeps_less_and_multiplies_more(shallow):
    shallow(6)
    words = [*TINY_LLAMA, *SMALL]
    plain = make_plan("base_config", overrides=words, gpu="h100")
    checked = make_plan(
        "base_config", overrides=[*words, "train.gradient_checkpointing=true"], gpu="h100"
    )
    ours, theirs = (next(iter(report.predictions.values())) for report in (checked, plain))
    assert ours.memory["train"].parts["activations"] < (
        0.4 * theirs.memory["train"].parts["activations"]
    )
    assert 1.2 < ours.times.step_s / theirs.times.step_s < 1.5


def test_full_fine_tuning_can_be_planned(shallow):
    shallow(2)
    words = ["lora.placement=full", "train.batch_size=2", *SMALL]
    report = make_plan("demo", overrides=words, gpu="l4")
    weights = 134_515_008 - 28 * 3_540_096
    (found,) = report.predictions.values()
    parts = found.memory["train"].parts
    assert parts["weights"] == pytest.approx(4 * weights / 2**30, rel=0.01)
    assert parts["optimizer"] == pytest.approx(8 * weights / 2**30, rel=0.01)


def test_a_calibration_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path))
    device = this_device()
    config = load_config("demo", overrides=["dtype=float32"])
    assert target_of(None, config=config).rates is None
    measured = Calibration(
        device=device.name, dtype="float32", threads=torch.get_num_threads(), flop_per_s=1e11,
        byte_per_s=1e10, overhead_s=1e-6, factor=1.5, measured_at="2026-01-01", torch="2.13.0",
    )  # fmt: skip
    path = write_calibration(measured)
    assert read_calibration(device, dtype="float32") == measured
    assert read_calibration(device, dtype="bfloat16") is None
    target = target_of(None, config=config)
    assert target.rates.factor == 1.5
    assert "2026-01-01" in target.basis
    path.write_text("{")
    assert read_calibration(device, dtype="float32") is None


def test_a_device_is_calibrated_by_measuring_it(monkeypatch):
    """Small sizes: that each figure is there and of the right order, not that it is precise."""
    from loracle.forecast import calibration

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    monkeypatch.setitem(calibration._SIZES, "cpu", size)
    monkeypatch.setattr(calibration, "_BATCH", [(5, 9)] * 2)
    monkeypatch.setattr(calibration, "_ADDED", 1 << 16)
    said = []
    found = calibrate(say=said.append)
    assert said == ["products", "memory", "calls", "a step"]
    assert 1e8 < found.flop_per_s < 1e16
    assert 1e7 < found.byte_per_s < 1e14
    assert 1e-8 < found.overhead_s < 1e-2
    assert found.factor > 0


def test_predictions_do_not_depend_on_how_many_are_made_at_once(shallow, study):
    shallow(3)
    arms = planned_arms(study, overrides=[])
    device = device_of("t4")
    some = predict_arms(arms, device=device, rates=None, only=["all-linear", "last-third"])
    alone = predict_arms(arms, device=device, rates=None, only=["last-third"])
    assert some["last-third"].memory == alone["last-third"].memory
    assert lengths_of(arms.config).num_records == 999
