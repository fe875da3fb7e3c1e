"""Whole runs on a base in 4 bits: measured, audited, and never mixed with other runs."""

import pytest

from loracle.records.signature import environment_differences
from runs_fixture import load, settings

PACKED = settings(quantization="nf4", train__max_steps=6, eval__every_steps=0)


@pytest.fixture(scope="module")
def packed(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "run"
    outcome = place.baseline("--out", folder, *PACKED)
    assert outcome.code == 0, outcome.err
    return folder


def test_a_run_trains_evaluates_saves_and_is_audited(packed):
    result = load(packed / "result.json")
    quality = result["quality"]
    assert quality["tuned"]["loss_nats_per_token"] < quality["base"]["loss_nats_per_token"]
    assert result["audit"]["faults"] == []
    assert result["audit"]["frozen_weights_unchanged"] is True
    latency = result["efficiency"]["latency_ms_per_token"]
    assert latency["merged"] is None
    assert latency["base"] > 0
    assert latency["unmerged"] > 0


def test_counts_are_those_of_the_model_itself(packed, finished):
    ours, theirs = (load(run / "result.json")["efficiency"] for run in (packed, finished))
    for key in ("trainable_params", "total_params", "full_finetune_params"):
        assert ours[key] == theirs[key]
    assert ours["peak_memory_gib"]["train_tensors"] < theirs["peak_memory_gib"]["train_tensors"]


def test_it_is_a_stratum_of_its_own(packed, finished):
    ours, theirs = (load(run / "environment.json") for run in (packed, finished))
    assert "device.quantization: None -> 'nf4'" in environment_differences(theirs, ours)
    assert "|dtype:float32+nf4|" in load(packed / "result.json")["signature"]
    assert "|dtype:float32|" in load(finished / "result.json")["signature"]
    assert "bitsandbytes" in ours["versions"]
    assert "bitsandbytes" not in theirs["versions"]


def test_a_table_does_not_mix_it_with_others(place, packed, finished, tmp_path):
    import shutil

    for index, run in enumerate((packed, finished)):
        shutil.copytree(run, tmp_path / "runs" / str(index))
    outcome = place.loracle("report", tmp_path / "runs", "--markdown")
    assert outcome.code == 2
    assert "dtype: float32+nf4 and float32" in outcome.line


def test_answers_come_from_the_packed_base_too(place, packed):
    outcome = place.loracle("sample", packed, "Name a color.")
    assert outcome.code == 0, outcome.err


def test_full_fine_tuning_of_packed_weights_is_refused(place, tmp_path):
    outcome = place.baseline("--out", tmp_path / "run", *PACKED, lora__placement="full")
    assert outcome.code == 2
    assert "placement 'full': weights in 4 bits cannot train" in outcome.err
    assert not (tmp_path / "run").exists()


def test_another_kind_of_packing_is_refused(place, tmp_path):
    outcome = place.baseline("--out", tmp_path / "run", quantization="int8")
    assert outcome.code == 2
    assert "quantization: " in outcome.line
