"""The saved adapter, in the hands of somebody who has never heard of LoRAcle."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from loracle.model.adapters import attach_adapter, save_adapter, save_tokenizer
from loracle.model.identity import described_tokenizer
from loracle.records.result import read_result
from loracle.records.run_state import recorded_config
from loracle.runner.adapter_card import adapter_card
from loracle.screen import quiet_transformers
from loracle.sources import ResolvedSource
from runs_fixture import load, rows
from tiny_engine import stock_model, tiny_base, tiny_plan

SCRIPT = Path(__file__).parents[2] / "experiments" / "reload_with_stock_peft.py"
# Makes any import of the package an error, whatever the script says of itself.
ALONE = "import runpy, sys; sys.modules['loracle'] = None; runpy.run_path(sys.argv.pop(1))"


def reload(run, *, model, environment=None):
    """Runs the script in a process of its own; returns what it prints and both losses."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(SCRIPT), str(run), str(model)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    recorded, reloaded = (float(loss) for loss in re.findall(r"ed  ([\d.]+) nats", done.stdout))
    return done.stdout, recorded, reloaded


def test_stock_peft_gives_the_recorded_validation_loss(finished, place):
    out, recorded, reloaded = reload(finished, model=place.model, environment=place.environment)
    quality = load(finished / "result.json")["quality"]["tuned"]
    assert out.startswith("12 validation examples, 146 tokens, float32\n")
    assert recorded == pytest.approx(quality["loss_nats_per_token"], abs=1e-8)
    assert reloaded == pytest.approx(quality["loss_nats_per_token"], rel=1e-5)
    base = load(finished / "result.json")["quality"]["base"]["loss_nats_per_token"]
    assert abs(reloaded - base) > 100 * abs(reloaded - recorded)


def test_the_script_does_not_use_the_package():
    imports = re.findall(r"^(?:from|import) (\w+)", SCRIPT.read_text(), re.MULTILINE)
    assert "peft" in imports
    assert "loracle" not in imports


def test_the_adapters_files_are_pefts_own_and_say_what_was_trained(finished, place):
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(finished / "adapter")
    modules = {module["name"] for module in load(finished / "modules.json")["modules"]}
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors
    } == modules
    assert len(tensors) == 2 * len(modules)
    # PEFT itself shortens a list of 20 modules or more to endings that mean the same.
    assert all(name.endswith(tuple(config.target_modules)) for name in modules)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32.0, 0.1)
    assert (config.task_type, config.bias) == ("CAUSAL_LM", "none")
    assert (config.base_model_name_or_path, config.revision) == (str(place.model), None)
    written = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])


def nll_of(model, tokenizer, row) -> float:
    """The loss of a recorded example's answer, in nats, by a stock model."""
    from loracle.data import Record
    from loracle.data.prompt import ALPACA

    prompt = tokenizer(ALPACA.render(Record(0, row["instruction"], row["input"], ""))).input_ids
    answer = tokenizer(row["reference"], add_special_tokens=False).input_ids
    answer = [*answer, tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


def test_by_its_name_alone_the_adapter_opens_from_any_folder(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with quiet_transformers():
        model = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "adapter")
    for row in rows(finished / "examples.jsonl"):
        assert nll_of(model, tokenizer, row) == pytest.approx(row["nll_sum_nats"], rel=1e-5)


def test_the_tokenizer_beside_the_adapter_is_the_bases(finished, place):
    ours, theirs = (AutoTokenizer.from_pretrained(at) for at in (finished / "adapter", place.model))
    assert described_tokenizer(ours) == described_tokenizer(theirs)


TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_base_on_the_hub_is_named_by_id_and_commit(tmp_path, monkeypatch):
    """The hub's cache is what a machine has that was there; ``main`` has moved on since."""
    hub = tmp_path / "hub" / "models--org--name"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    stock_model().save_pretrained(hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("f" * 40)
    found = ResolvedSource(hub / "snapshots" / COMMIT, "hub:org/name", COMMIT)
    assert found.stock_name == ("org/name", COMMIT)
    name, revision = found.stock_name
    base = tiny_base()
    attach_adapter(
        base, name="default", plan=tiny_plan(), dropout=0.0, seed=0,
        model_source=name, revision=revision,
    )  # fmt: skip
    saved = save_adapter(base, name="default", folder=tmp_path / "adapter")
    written = json.loads((saved / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/name", COMMIT)
    save_tokenizer(base, folder=saved)
    with quiet_transformers():
        model = AutoPeftModelForCausalLM.from_pretrained(saved, cache_dir=tmp_path / "hub")
    assert model.get_base_model().config._name_or_path == "org/name"


@pytest.mark.parametrize("source", ["path:../models/m", "pypi:thing==1.0/m.gguf"])
def test_a_base_that_is_not_on_the_hub_is_named_by_its_folder(source, tmp_path):
    assert ResolvedSource(tmp_path, source, "sha256:1").stock_name == (str(tmp_path), None)


@pytest.mark.parametrize(("more_rows", "kept"), [(-1, []), (0, TOKENIZER), (64, TOKENIZER)])
def test_a_tokenizer_with_more_tokens_than_the_base_stays_with_the_base(tmp_path, more_rows, kept):
    """PEFT would give the base rows for them, and every loss would be another."""
    base = tiny_base()
    rows = len(base.tokenizer) + more_rows
    base.model.set_input_embeddings(torch.nn.Embedding(rows, 32))
    save_tokenizer(base, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_the_card_says_what_the_adapter_is_and_how_well_it_does(finished):
    card = (finished / "adapter" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "path:../../../inputs/model"
    assert front["library_name"] == "peft"
    quality = load(finished / "result.json")["quality"]
    for model in ("base", "tuned"):
        assert f"{quality[model]['loss_nats_per_token']:.4f}" in card
        assert f"{quality[model]['perplexity']:.3f}" in card
    facts = ("| rank | 16 |", "| alpha | 32 |", "`all-linear`, 21 modules", 'dtype="float32"')
    for words in (*facts, "On 12 held-out examples, 146 tokens.", "another\nmachine"):
        assert words in card


@pytest.mark.parametrize(
    "arm", ["[a](http://b)", "<img src=x>", "a\n# b\x1b[31m", "`|`", "a\u202eb"], ids=repr
)
def test_names_in_the_card_are_text(finished, arm):
    from loracle.placement import ModulePlan

    plan = ModulePlan.from_json(load(finished / "modules.json"))
    base = ResolvedSource(Path("/m"), f"path:{arm}", "sha256:1")
    result = replace(read_result(finished), arm=arm)
    card = adapter_card(
        result, config=recorded_config(finished), plan=replace(plan, placement=arm), base=base
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == f"path:{arm}"
    for mark in ("](", "<", "\x1b", "\u202e", "| |`"):
        assert mark not in body.replace("| | base", "").replace("| | |", "")
    assert body.count("\n# ") == 1


def test_the_card_of_a_model_on_the_hub_names_it_as_the_hub_does(finished):
    from loracle.placement import ModulePlan

    plan = ModulePlan.from_json(load(finished / "modules.json"))
    base = ResolvedSource(Path("/m"), "hub:org/name", COMMIT)
    config = recorded_config(finished).model_copy(update={"quantization": "nf4"})
    card = adapter_card(read_result(finished), config=config, plan=plan, base=base)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/name"
    assert COMMIT in card
    assert "machine, load the base yourself" not in card
    assert "4 bits (nf4)" in card
