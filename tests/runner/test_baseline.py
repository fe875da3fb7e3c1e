"""A finished run is the contract: its files, its keys, and numbers that follow from each other."""

import math
import shutil
import socket
import statistics

import pytest
import yaml
from sacrebleu.metrics import BLEU, CHRF
from safetensors.torch import load_file

from loracle.config.files import load_config
from runs_fixture import USER, build_place, digest, facts, load, rows

FLOAT, INT, TEXT = (float,), (int,), (str,)
QUALITY = {
    "loss_nats_per_token": FLOAT,
    "perplexity": FLOAT,
    "bleu": FLOAT,
    "chrf": FLOAT,
    "hit_limit_frac": FLOAT,
    "num_examples": INT,
    "num_targets": INT,
    "num_answers": INT,
    "bleu_signature": TEXT,
    "chrf_signature": TEXT,
}
VARIANTS = {"base": FLOAT, "unmerged": FLOAT, "merged": FLOAT}
CRITERION = {"passed": (bool, type(None)), "evidence": TEXT}
RESULT = {
    "schema": INT,
    "status": TEXT,
    "signature": TEXT,
    "arm": TEXT,
    "placement": TEXT,
    "seed": INT,
    "quality": {"base": QUALITY, "tuned": QUALITY},
    "efficiency": {
        "trainable_params": INT,
        "total_params": INT,
        "trainable_frac": FLOAT,
        "full_finetune_params": INT,
        "step_time_s": {"median": FLOAT, "p25": FLOAT, "p75": FLOAT},
        "epoch_time_s": FLOAT,
        "throughput_tokens_per_s": FLOAT,
        "peak_memory_gib": {"kind": TEXT, "train": FLOAT, "evaluate": FLOAT},
        "latency_ms_per_token": VARIANTS,
    },
    "criteria": {
        "convergence": CRITERION,
        "validation": CRITERION,
        "efficiency": CRITERION,
        "reproducibility": CRITERION,
    },
}


def faults(value, shape, *, key="result"):
    """Yields where ``value`` is not of ``shape``; keys beyond the contract may be there."""
    if isinstance(shape, dict):
        for name, inner in shape.items():
            if not isinstance(value, dict) or name not in value:
                yield f"{key}.{name} is missing"
            else:
                yield from faults(value[name], inner, key=f"{key}.{name}")
    elif type(value) not in shape:
        yield f"{key} is {value!r}"


@pytest.fixture(scope="module")
def result(finished):
    return load(finished / "result.json")


@pytest.fixture(scope="module")
def examples(finished):
    return rows(finished / "examples.jsonl")


def test_the_run_folder_holds_what_the_contract_names_and_nothing_else(finished):
    assert {path.name for path in finished.iterdir()} == {
        ".lock",
        "adapter",
        "checkpoints",
        "config.yaml",
        "data.json",
        "environment.json",
        "evals.jsonl",
        "examples.jsonl",
        "modules.json",
        "result.json",
        "status.json",
        "steps.jsonl",
        "wandb",
    }
    assert {path.name for path in (finished / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"]


def test_the_result_has_the_keys_of_the_contract_with_their_types(result):
    assert list(faults(result, RESULT)) == []
    assert (result["schema"], result["status"]) == (1, "completed")
    assert (result["arm"], result["placement"], result["seed"]) == ("all-linear", "all-linear", 0)


def test_the_status_is_completed_at_the_last_step(finished):
    status = load(finished / "status.json")
    assert (status["status"], status["step"], status["max_steps"]) == ("completed", 8, 8)
    assert status["error"] is None


def test_an_example_has_the_keys_of_the_contract_and_no_answer_where_none_was_made(examples):
    scored = {"instruction", "input", "reference", "tokens", "nll_sum_nats", "base_nll_sum_nats"}
    for row in examples:
        assert scored | {"generated"} <= row.keys()
        assert all(row[key] is not None for key in scored)
    answered = [row["generated"] is not None for row in examples]
    assert answered == [True] * 4 + [False] * 8
    assert [row["base_generated"] is not None for row in examples] == answered


def test_examples_are_the_held_out_records_in_source_order(finished, examples, place):
    source = load(place.data)
    for row in examples:
        record = source[row["row"] - 1]
        given = (row["instruction"], row["input"], row["reference"])
        assert given == (record["instruction"], record["input"], record["output"])
    assert [row["row"] for row in examples] == sorted(row["row"] for row in examples)
    assert len(examples) == load(finished / "data.json")["validation"]["num_examples"] == 12


@pytest.mark.parametrize(
    ("model", "key"), [("tuned", "nll_sum_nats"), ("base", "base_nll_sum_nats")]
)
def test_perplexity_is_exp_of_all_nll_over_all_tokens_of_the_examples(result, examples, model, key):
    tokens = sum(row["tokens"] for row in examples)
    loss = math.fsum(row[key] for row in examples) / tokens
    quality = result["quality"][model]
    assert quality["loss_nats_per_token"] == pytest.approx(loss, rel=1e-12)
    assert quality["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    assert (quality["num_examples"], quality["num_targets"]) == (len(examples), tokens)


@pytest.mark.parametrize(("model", "key"), [("tuned", "generated"), ("base", "base_generated")])
def test_text_scores_are_sacrebleus_of_the_kept_answers(result, examples, model, key):
    answered = [row for row in examples if row[key] is not None]
    answers = [row[key] for row in answered]
    references = [[row["reference"] for row in answered]]
    quality = result["quality"][model]
    assert quality["bleu"] == BLEU().corpus_score(answers, references).score
    assert quality["chrf"] == CHRF().corpus_score(answers, references).score
    assert quality["num_answers"] == len(answered)
    limit = "hit_limit" if model == "tuned" else "base_hit_limit"
    assert quality["hit_limit_frac"] == sum(row[limit] for row in answered) / len(answered)


def test_validations_are_recorded_before_during_and_after(finished, result):
    found = rows(finished / "evals.jsonl")
    assert [(row["step"], row["model"]) for row in found] == [
        (0, "base"),
        (4, "tuned"),
        (8, "tuned"),
    ]
    assert found[0]["perplexity"] == result["quality"]["base"]["perplexity"]
    assert found[-1]["perplexity"] == result["quality"]["tuned"]["perplexity"]


def test_parameters_are_counted_alike_in_plan_adapter_and_result(finished, result, place):
    modules = load(finished / "modules.json")["modules"]
    efficiency = result["efficiency"]
    saved = load_file(finished / "adapter" / "adapter_model.safetensors")
    model = load_file(place.model / "model.safetensors")
    trainable = sum(16 * (module["in_features"] + module["out_features"]) for module in modules)
    assert efficiency["trainable_params"] == trainable
    assert efficiency["trainable_params"] == sum(tensor.numel() for tensor in saved.values())
    assert efficiency["full_finetune_params"] == sum(tensor.numel() for tensor in model.values())
    assert efficiency["total_params"] == trainable + efficiency["full_finetune_params"]
    assert efficiency["trainable_frac"] == trainable / efficiency["total_params"]


def test_times_follow_from_the_clocked_steps(finished, result):
    steps = rows(finished / "steps.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["clocked"] for row in steps] == [False, False] + [True] * 6
    times = [row["step_time_s"] for row in steps if row["clocked"]]
    tokens = [row["num_tokens"] for row in steps if row["clocked"]]
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive")
    efficiency = result["efficiency"]
    clock = {"median": median, "p25": p25, "p75": p75, "num_steps": 6}
    assert efficiency["step_time_s"] == pytest.approx(clock)
    steps_per_epoch = load(finished / "data.json")["train"]["num_examples"] / 4
    assert efficiency["epoch_time_s"] == pytest.approx(statistics.fmean(times) * steps_per_epoch)
    assert efficiency["throughput_tokens_per_s"] == pytest.approx(sum(tokens) / sum(times))


def test_an_epoch_is_every_training_example_once(finished):
    report = load(finished / "data.json")
    steps = rows(finished / "steps.jsonl")
    assert steps[-1]["epoch"] == 8 * 4 / report["train"]["num_examples"]
    assert sum(row["num_targets"] for row in steps) < report["train"]["num_targets"]


def test_the_signature_names_what_the_result_is_a_result_of(finished, result):
    parts = dict(part.split(":", 1) for part in result["signature"].split("|"))
    assert parts["data"] == load(finished / "data.json")["fingerprint"]
    assert (parts["placement"], parts["r"], parts["steps"]) == ("all-linear", "16", "8")
    assert (parts["seed"], parts["dtype"]) == ("0", "float32")
    assert parts["model"].startswith("path:model@sha256:")
    assert parts["torch"] == load(finished / "environment.json")["versions"]["torch"]


def test_the_audit_holds(result, finished):
    audit = result["audit"]
    assert audit["faults"] == []
    assert audit["updated_modules"] == audit["planned_modules"] == 21
    assert audit["frozen_weights_unchanged"]
    assert audit["reload_difference"] <= 1e-5
    assert result["adapter_sha256"] == digest(finished / "adapter" / "adapter_model.safetensors")


def test_the_recorded_config_is_the_resolved_one_but_for_the_machines_folders(finished, place):
    recorded = yaml.safe_load((finished / "config.yaml").read_text())
    with place.entered():
        asked = load_config(place.config, overrides=["tracking.mode=offline"]).model_dump()
    assert recorded["model"] == "path:../../../inputs/model"
    assert recorded["data"]["source"] == "path:../../../inputs/data.json"
    recorded["model"], recorded["data"]["source"] = asked["model"], asked["data"]["source"]
    assert recorded == asked


def test_nothing_in_the_folder_names_the_machine_or_its_user(finished, place):
    """W&B's binary file too. What the folder's own inputs say of themselves is not the machine."""
    root = place.home.parents[1]
    names = [str(root), str(root.parent), USER, str(place.home), "/tmp/", "pytest-of"]
    if len(socket.gethostname()) > 5:
        names.append(socket.gethostname())
    read = 0
    for path in finished.rglob("*"):
        if path.is_file():
            read += 1
            content = path.read_bytes()
            assert [name for name in names if name.encode() in content] == [], path.name
    assert read >= 15


def test_data_in_the_home_is_recorded_from_the_home(tmp_path):
    place = build_place(tmp_path)
    (place.home / "data").mkdir()
    shutil.move(place.data, place.home / "data" / "mine.json")
    outcome = place.baseline(
        "--out",
        tmp_path / "run",
        data__source=f"path:{place.home}/data/mine.json",
        train__max_steps=2,
        eval__generate_examples=0,
        measure__latency_trials=0,
    )
    assert outcome.code == 0, outcome.err
    assert "source: path:~/data/mine.json" in (tmp_path / "run" / "config.yaml").read_text()
    for path in (tmp_path / "run").rglob("*.*"):
        assert path.is_dir() or USER.encode() not in path.read_bytes(), path.name


def test_what_was_not_measured_is_null_and_never_zero(place, tmp_path):
    outcome = place.baseline(
        "--out",
        tmp_path / "run",
        train__max_steps=2,
        eval__generate_examples=0,
        eval__max_examples=3,
        measure__latency_trials=0,
    )
    assert outcome.code == 0, outcome.err
    result = load(tmp_path / "run" / "result.json")
    efficiency = result["efficiency"]
    for quality in result["quality"].values():
        assert quality["bleu"] is quality["chrf"] is quality["hit_limit_frac"] is None
        assert quality["bleu_signature"] is quality["num_answers"] is None
        assert quality["num_examples"] == 3
    clock = {"median": None, "p25": None, "p75": None, "num_steps": 0}
    assert efficiency["step_time_s"] == clock
    assert efficiency["epoch_time_s"] is efficiency["throughput_tokens_per_s"] is None
    assert set(efficiency["latency_ms_per_token"].values()) == {None}
    assert set(efficiency["latency_first_token_ms"].values()) == {None}
    assert efficiency["peak_memory_gib"]["generate"] is None
    assert result["criteria"]["convergence"]["passed"] is None
    examples = rows(tmp_path / "run" / "examples.jsonl")
    assert [row["generated"] for row in examples] == [None] * 3
    assert outcome.out.count("n/a") >= 9


def test_the_same_config_gives_the_same_bits_and_says_so(finished, place):
    first = load(finished / "result.json")["criteria"]["reproducibility"]
    assert first["passed"] is None
    assert "run it again" in first["evidence"]
    again = finished.parent / "again"
    assert place.baseline("--out", again).code == 0
    assert facts(again) == facts(finished)
    second = load(again / "result.json")
    assert second["criteria"]["reproducibility"]["passed"] is True
    evidence = second["criteria"]["reproducibility"]["evidence"]
    assert "Bit-identical adapter and losses in 1 earlier run(s)" in evidence
    assert second["adapter_sha256"][:12] in evidence
    assert evidence.endswith("latest first.")


def test_another_seed_is_another_run_and_no_repeat_of_this_one(finished, place):
    other = finished.parent / "other-seed"
    assert place.baseline("--out", other, seed=1).code == 0
    before, after = facts(finished), facts(other)
    assert before["adapter"] != after["adapter"]
    assert [row["loss_nats_per_token"] for row in after["steps"]] != [
        row["loss_nats_per_token"] for row in before["steps"]
    ]
    assert load(other / "result.json")["criteria"]["reproducibility"]["passed"] is None
    assert load(other / "data.json") == load(finished / "data.json")
    assert after["quality"]["base"] == before["quality"]["base"]


def test_a_learning_rate_that_explodes_fails_the_run_and_leaves_no_result(place, tmp_path):
    outcome = place.baseline("--out", tmp_path / "run", train__learning_rate="1e30")
    assert outcome.code == 1
    message = outcome.err.splitlines()[-1]
    assert message.startswith("NonFiniteError: step ")
    assert "lower train.learning_rate (now 1e+30)" in message
    status = load(tmp_path / "run" / "status.json")
    assert status["status"] == "failed"
    assert status["error"] == message.removeprefix("NonFiniteError: ")
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_fails_its_audit_is_not_completed(place, tmp_path, monkeypatch):
    monkeypatch.setattr("loracle.runner.audit.tolerated", lambda *_, **__: -1.0)
    outcome = place.baseline("--out", tmp_path / "run", train__max_steps=2)
    assert outcome.code == 1
    message = outcome.err.splitlines()[-1]
    assert message.startswith("AuditError: audit: the saved adapter gives ")
    assert load(tmp_path / "run" / "status.json")["status"] == "failed"
    assert load(tmp_path / "run" / "result.json")["status"] == "failed"
