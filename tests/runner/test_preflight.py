"""A model that this machine cannot hold is not fetched first."""

import pytest

from geometries import TINY, UNUSUAL
from loracle.config.files import load_config
from loracle.errors import LeakError, UsageError
from loracle.forecast.devices import DEVICES, Device
from loracle.runner.preflight import preflight, weights_gib


def here(monkeypatch, device):
    monkeypatch.setattr("loracle.forecast.devices.this_device", lambda: device)


def test_weights_are_the_closed_form():
    assert weights_gib("llama-2-7b", bytes_each=2, packed=False) == pytest.approx(
        2 * 6_738_415_616 / 2**30
    )
    assert 3.3 < weights_gib("llama-2-7b", bytes_each=2, packed=True) < 3.8


def test_seven_billion_parameters_do_not_fit_a_small_gpu(monkeypatch):
    here(monkeypatch, Device("a gpu", 10.0, has_bf16=True))
    with pytest.raises(UsageError, match=r"12\.6 GiB in bfloat16 .* quantization=nf4 takes a qua"):
        preflight(load_config(overrides=["model=llama-2-7b"]))
    preflight(load_config(overrides=["model=llama-2-7b", "quantization=nf4"]))


def test_a_device_with_a_profile_is_told_of_it(monkeypatch):
    t4 = DEVICES["t4"]
    here(monkeypatch, Device("Tesla T4", t4.memory_gib, has_bf16=False))
    preflight(load_config(overrides=["model=llama-2-7b"]))
    with pytest.raises(UsageError, match=r"25\.1 GiB in float32 .* --fit takes the settings"):
        preflight(load_config(overrides=["model=llama-2-7b", "dtype=float32"]))


def test_a_model_whose_rows_would_leak_is_not_fetched(monkeypatch):
    here(monkeypatch, Device("a gpu", 80.0, has_bf16=True))
    config = load_config(overrides=["model=hub:org/leaky"])
    architectures = iter([UNUSUAL["rwkv"], TINY["llama"]])
    monkeypatch.setattr(f"{preflight.__module__}.model_architecture", lambda _: next(architectures))
    monkeypatch.setattr(f"{preflight.__module__}.weights_gib", lambda *_, **__: 1.0)
    with pytest.raises(LeakError, match=r"^RwkvForCausalLM: sequences that share a row change"):
        preflight(config)
    preflight(config)


def test_models_that_are_not_fetched_are_not_looked_at(monkeypatch):
    here(monkeypatch, Device("a tiny machine", 1e-6, has_bf16=True))
    preflight(load_config("demo"))


def test_it_comes_before_everything_else(place, tmp_path, monkeypatch):
    here(monkeypatch, Device("a small machine", 2.0, has_bf16=True, is_gpu=False))
    outcome = place.baseline("--out", tmp_path / "run", model="llama-2-7b")
    assert outcome.code == 2
    assert "llama-2-7b: its weights take 25.1 GiB in float32" in outcome.line
    assert not (tmp_path / "run").exists()
