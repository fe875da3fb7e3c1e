"""The commands on pretended cards: each ends as it should, and leaves its records."""

import json
import os
import signal
import time

import pytest
from run import CARDS

from conftest import HERE


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("card", CARDS)
def test_a_baseline_ends_with_a_result(ground, card):
    out = ground.folder / f"baseline-{card}"
    ended = ground.on(card, "loracle", "baseline", ground.config, "--out", out)
    assert ended.code == 0, ended.out[-3000:]
    result = result_of(out)
    assert result["status"] == "completed"
    assert result["efficiency"]["peak_memory_gib"]["kind"] == "cuda_allocated"
    assert ("float16" if card == "t4" else "bfloat16") in result["signature"]
    if card in ("t4", "h100"):
        again = ground.on(card, "loracle", "sample", out, "Name a river.")
        assert again.code == 0, again.out[-3000:]


@pytest.mark.parametrize("card", ["t4", "a100"])
def test_an_interrupted_run_goes_on(ground, card):
    out = ground.folder / f"resumed-{card}"
    words = ("loracle", "baseline", ground.config, "--out", out, "--set", "train.max_steps=60")
    cudnn_off = {"PRETEND_CUDNN": "off"}
    process = ground.start(card, *words, **cudnn_off)
    while process.poll() is None and _steps(out) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130, said[-3000:]
    assert any((out / "checkpoints").iterdir())
    before = _steps(out)
    assert before < 60
    ended = ground.on(card, *words, "--resume", **cudnn_off)
    assert ended.code == 0, ended.out[-3000:]
    assert result_of(out)["status"] == "completed"
    assert _steps(out) == 60


def _steps(out):
    file = out / "steps.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


@pytest.mark.parametrize("card", ["t4", "a100"])
def test_a_study_of_three_arms_ends_with_its_report(ground, card):
    out = ground.folder / f"study-{card}"
    ended = ground.on(card, "loracle", "study", ground.study, "--out", out)
    assert ended.code == 0, ended.out[-3000:]
    assert len(list(out.glob("runs/*/result.json"))) == 3
    assert (out / "predicted.json").exists()


@pytest.mark.parametrize("card", CARDS)
def test_a_plan_of_a_study_is_made(ground, card):
    ended = ground.on(card, "loracle", "plan", ground.study)
    assert ended.code == 0, ended.out[-3000:]


def test_a_run_is_fitted_to_a_small_card(ground):
    """As on a T4, as given it does not fit: batches of evaluation are halved until it does."""
    words = ("--fit", "--set", "model=path:" + str(_large(ground)))
    out = ground.folder / "fitted"
    ended = ground.on(
        "t4", "loracle", "baseline", ground.config, *words, "--out", out, PRETEND_MIB="1500"
    )
    assert ended.code == 0, ended.out[-3000:]
    assert result_of(out)["status"] == "completed"


def test_a_base_that_fills_more_than_half_the_card_ends_with_a_result(ground):
    words = ("--set", "model=path:" + str(_large(ground)), "--set", "train.batch_size=1")
    out = ground.folder / "full"
    ended = ground.on(
        "l4", "loracle", "baseline", ground.config, *words, "--out", out, PRETEND_MIB="870",
        PRETEND_COPY_MAX=str(64 << 20),
    )  # fmt: skip
    assert ended.code == 0, ended.out[-3000:]
    assert result_of(out)["status"] == "completed"


def test_four_bits_train_and_answer(ground):
    out = ground.folder / "nf4"
    words = ("--set", "quantization=nf4", "--set", "train.gradient_checkpointing=true")
    ended = ground.on("t4", "loracle", "baseline", ground.config, *words, "--out", out)
    assert ended.code == 0, ended.out[-3000:]
    assert result_of(out)["status"] == "completed"


@pytest.mark.parametrize("card", ["l4", "h100"])
def test_four_runs_share_a_bundle(ground, card):
    out = ground.folder / f"bundle-{card}"
    ended = ground.on(card, "python", HERE / "bundle.py", ground.config, out, PRETEND_CUDNN="off")
    assert ended.code == 0, ended.out[-3000:]
    assert len(list(out.glob("*/result.json"))) == 4


def _large(ground):
    """A folder of a model of 209 MB in 16 bits, made once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiny import tiny_tokenizer

    folder = ground.folder / "large"
    if not folder.exists():
        config = LlamaConfig(
            vocab_size=384,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=8,
            num_attention_heads=8,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).half().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder
