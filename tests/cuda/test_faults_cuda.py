"""Whole runs on pretended cards: a base held once, operations that repeat, decoding, loading."""

import json

import pytest
from holes import write_holes
from run import CARDS

from conftest import last_json
from tiny import write_records

SHORT = (
    "train.max_steps=3", "train.batch_size=4", "eval.every_steps=0", "eval.generate_examples=2",
    "eval.max_new_tokens=4", "measure.latency_trials=1", "measure.latency_new_tokens=3",
    "measure.skip_steps=1", "audit.reload_examples=4", "checkpoint.every_steps=2",
    "tracking.mode=disabled",
)  # fmt: skip
NF4 = "quantization=nf4"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A LLaMA-2-7B of one layer without weights, 0.87 GiB in 16 bits, and a few records."""
    folder = tmp_path_factory.mktemp("sources")
    write_holes(folder / "model", layers=1, dtype="F16")
    write_records(folder / "records.json", count=60, seed=0)
    return folder


@pytest.fixture
def baseline(ground, sources, tmp_path):
    """Runs a short baseline on a card; returns how it ended and its folder."""

    def run(card, *overrides, **variables):
        words = [word for text in (*short(sources), *overrides) for word in ("--set", text)]
        out = tmp_path / "run"
        return ground.on(
            card, "loracle", "baseline", "demo", "--out", out, *words, **variables
        ), out

    return run


def short(sources):
    """Overrides of a short run on these sources."""
    model, data = sources / "model", sources / "records.json"
    return (f"model=path:{model}", f"data.source=path:{data}", *SHORT)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_card_that_holds_a_base_once_is_enough_for_latency_and_audit(baseline):
    """Two bases are 1776 MiB; the context takes 400 of 2048."""
    ended, out = baseline("l4", PRETEND_MIB="2048")
    assert ended.code == 0, ended.out[-3000:]
    result = load(out / "result.json")
    assert result["audit"]["faults"] == []
    latency = result["efficiency"]["latency_ms_per_token"]
    assert None not in latency.values()


@pytest.mark.parametrize("packing", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("card", CARDS)
def test_a_whole_run_repeats_its_operations(card, packing, baseline):
    """Strict mode raises at an operation that has no deterministic form; others would warn."""
    ended, out = baseline(card, "deterministic=true", *([packing] if packing else []))
    assert ended.code == 0, ended.out[-3000:]
    assert "determinis" not in ended.out.lower()
    settings = load(out / "environment.json")["torch_settings"]
    assert settings["deterministic_algorithms"]
    assert "|deterministic:yes|" in load(out / "result.json")["signature"]


def test_operations_that_do_not_repeat_can_be_asked_for_and_are_recorded(baseline):
    ended, out = baseline("a100", "deterministic=false")
    assert ended.code == 0, ended.out[-3000:]
    assert not load(out / "environment.json")["torch_settings"]["deterministic_algorithms"]
    assert "deterministic:" not in load(out / "result.json")["signature"]


def test_what_makes_it_impossible_is_refused_in_one_line(baseline):
    ended, _ = baseline("a100", "deterministic=true", CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert ended.code == 2
    assert "deterministic: needs CUBLAS_WORKSPACE_CONFIG=:4096:8" in ended.out


BUNDLE = """
import sys
from pathlib import Path
from loracle import load_config
from loracle.runner.run_many import run_many
from loracle.runner.run_spec import RunSpec

out, *words = sys.argv[1:]
specs = [
    RunSpec(load_config("demo", overrides=[*words, f"lora.placement={name}"]), Path(out) / name)
    for name in ("all-linear", "attention")
]
sys.exit(any(outcome.error is not None for outcome in run_many(specs, bundle_size=2)))
"""


def test_a_bundle_repeats_its_operations_and_holds_its_base_once(ground, sources, tmp_path):
    words = (tmp_path / "runs", *short(sources), "deterministic=true")
    ended = ground.on("a100", "python", "-c", BUNDLE, *words, PRETEND_MIB="2300")
    assert ended.code == 0, ended.out[-3000:]
    assert "determinis" not in ended.out.lower()


SCORES = """
import json, sys
from pathlib import Path
import answers
import torch
from loracle.data import Example, Record
from loracle.engine.determinism import determinism
from loracle.engine.device import choose_device, choose_dtype
from loracle.model.load import load_base
from loracle.model.scores import score_modules

device = choose_device("auto")
with determinism(device, requested=True):
    dtype = choose_dtype("auto", device=device)
    packing = sys.argv[2] or None
    base = load_base(Path(sys.argv[1]), device=device, dtype=dtype, quantization=packing)
    examples = [Example(Record(n, "a", "", "b"), tuple(range(3, 40)), 5, False) for n in range(8)]
    found = {}
    for score in ("gradient-energy", "feature-norm", "weight-gradient"):
        rows = []
        for tokens in (400, 80):
            answers.forget()
            score_modules(base, examples, score=score, seed=0, micro_batch_tokens=tokens)
            rows.append(answers.counts()["waits"])
        found[score] = rows
print(json.dumps(found))
"""


@pytest.mark.parametrize("packing", ["", "nf4"])
def test_scores_repeat_and_wait_at_most_once_a_pass(packing, ground, sources):
    ended = ground.on("a100", "python", "-c", SCORES, sources / "model", packing)
    assert ended.code == 0, ended.out[-3000:]
    for score, (few, many) in last_json(ended.out).items():
        # 1 or 4 passes; a copy of all sums at the end, and of what was counted.
        assert few <= 3, score
        assert many <= few + 3, score


DECODED = """
import json, sys
from pathlib import Path
import answers
import torch
from loracle.engine.device import choose_device, choose_dtype
from loracle.model.load import load_base

device = choose_device("auto")
dtype = choose_dtype("auto", device=device)
base = load_base(Path(sys.argv[1]), device=device, dtype=dtype, quantization="nf4")
layer = base.model.model.layers[0].mlp.down_proj
found = {}
for rows in (1, 400):
    x = torch.zeros(rows, 11008, device=device, dtype=dtype)
    for mode in (torch.inference_mode, torch.no_grad):
        answers.forget()
        with mode():
            layer(x)
        found[f"{mode.__name__} {rows}"] = [name for name in answers.kernels()]
print(json.dumps(found))
"""


@pytest.mark.parametrize("card", CARDS)
def test_one_decoded_token_is_not_multiplied_by_unpacked_weights(card, ground, sources):
    ended = ground.on(card, "python", "-c", DECODED, sources / "model")
    assert ended.code == 0, ended.out[-3000:]
    found = last_json(ended.out)

    def unpacks(key):
        return any("dequant" in name.lower() for name in found[key])

    assert not unpacks("inference_mode 1")
    assert len(found["inference_mode 1"]) == 1
    assert unpacks("inference_mode 400")
    assert unpacks("no_grad 1"), "a score has the same bits whatever shares its pass"


LOADED = """
import json, sys, threading, time
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from loracle.engine.device import choose_device
from loracle.model import load

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20

def watch():
    while not ended:
        peaks.append(anonymous())
        time.sleep(0.005)

load.checked = lambda base: base
device = choose_device("auto")
torch.ones(1, device=device)
before, peaks, ended = anonymous(), [], []
threading.Thread(target=watch, daemon=True).start()
load.load_base(Path(sys.argv[1]), device=device, dtype=getattr(torch, sys.argv[2]))
ended.append(True)
print(json.dumps({"grown_gib": max(peaks) - before}))
"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loading_takes_the_host_a_few_tensors_whatever_the_dtype(dtype, ground, sources):
    """0.87 GiB of weights; the largest tensor has 0.24 GiB, and a few are read at once."""
    ended = ground.on("a100", "python", "-c", LOADED, sources / "model", dtype)
    assert ended.code == 0, ended.out[-3000:]
    assert last_json(ended.out)["grown_gib"] < 0.7
