"""Latency: each variant is the model it says, and the base is left as it was."""

from types import SimpleNamespace

import pytest
import torch

from loracle.config.run import PlacementConfig
from loracle.engine import latency
from loracle.engine.latency import (
    Latency,
    can_merge,
    generating_merged,
    measure_latency,
    merged_weight,
)
from loracle.model.inventory import inventory_of
from loracle.model.layers.lora import RoutedLinear
from tiny_engine import attach, stock_model, stock_peft, tiny_base, tiny_plan

PROMPT = (3, 9, 27, 17, 51)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_pefts_and_the_frozen_ones_come_back(family):
    base, plan = tiny_base(family), tiny_plan(family=family)
    adapter = attach(base, plan)
    digest = base.weights_digest()
    peft = stock_peft(stock_model(family), plan, like=adapter).merge_and_unload()
    with generating_merged(base, adapter="default"):
        for module in plan.modules:
            weight = base.model.get_submodule(module.name).get_base_layer().weight
            assert torch.equal(weight, peft.get_submodule(module.name).weight)
        assert base.weights_digest() != digest
    assert base.weights_digest() == digest


def test_merging_in_16_bit_adds_in_32():
    base = tiny_base(dtype=torch.bfloat16)
    attach(base, tiny_plan())
    layers = [layer for layer in base.model.modules() if isinstance(layer, RoutedLinear)]
    assert len(layers) == 21
    for layer in layers:
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        exact = layer.get_base_layer().weight.float() + layer.scaling["default"] * delta
        weight = merged_weight(layer, adapter="default")
        torch.testing.assert_close(weight, exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("layers_that_fit", [0, 5])
def test_merged_weights_that_do_not_fit_are_none(monkeypatch, layers_that_fit):
    real, done = RoutedLinear.get_delta_weight, []

    def full(layer, adapter):
        done.append(layer)
        if len(done) > layers_that_fit:
            raise torch.OutOfMemoryError("no room")
        return real(layer, adapter)

    base = tiny_base()
    attach(base, tiny_plan())
    digest = base.weights_digest()
    monkeypatch.setattr(RoutedLinear, "get_delta_weight", full)
    result = measure_latency(base, PROMPT, adapter="default", new_tokens=2, trials=1)
    assert result["merged"] is None
    assert result["unmerged"] is not None
    assert base.weights_digest() == digest


def test_other_errors_of_merging_are_not_taken_for_it(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    base = tiny_base()
    attach(base, tiny_plan())
    monkeypatch.setattr(RoutedLinear, "get_delta_weight", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure_latency(base, PROMPT, adapter="default", new_tokens=2, trials=1)


@pytest.mark.parametrize(("available_mib", "is_enough"), [(2048, True), (1024, False)])
def test_on_a_gpu_merging_needs_room_on_the_host(monkeypatch, available_mib, is_enough):
    base = tiny_base()
    attach(base, tiny_plan())
    memory = SimpleNamespace(available=available_mib << 20)
    monkeypatch.setattr(latency.psutil, "virtual_memory", lambda: memory)
    assert can_merge(base, adapter="default")
    base.device = torch.device("cuda")
    assert can_merge(base, adapter="default") is is_enough


def decoded_with(monkeypatch):
    """Records the logits that each timed decoding starts from."""
    seen = []

    def watch(base, prompt, new_tokens):
        logits = base.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        seen.append((logits, new_tokens))
        return 0.001 * new_tokens + 0.01

    monkeypatch.setattr(latency, "_decode_s", watch)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_variant_is_the_model_it_says(family, monkeypatch):
    stock = stock_model(family)
    # GPT-2's head is tied to its embedding, which must not be merged along.
    everything = PlacementConfig(modules=[m.name for m in inventory_of(stock).modules])
    plan = tiny_plan(everything, family=family)
    base = tiny_base(family)
    adapter = attach(base, plan)
    seen = decoded_with(monkeypatch)
    digest = base.weights_digest()
    measure_latency(base, PROMPT, adapter="default", new_tokens=3, trials=2)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = stock(input_ids=ids).logits[0, -1]
        tuned = stock_peft(stock, plan, like=adapter)(input_ids=ids).logits[0, -1]
    assert not torch.allclose(plain, tuned, atol=1e-2)
    assert [tokens for _, tokens in seen] == [1, 3] * 9
    for index, (logits, _) in enumerate(seen):
        expected = plain if index // 2 % 3 == 0 else tuned
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert base.weights_digest() == digest


def test_latency_is_the_median_over_trials_without_the_warm_up(monkeypatch):
    base = tiny_base()
    attach(base, tiny_plan())
    # Warm-up, then three trials; each variant: (one token, five tokens) in seconds.
    trials = [(9.0, 99.0), (0.1, 0.5), (0.2, 1.8), (0.3, 0.9)]
    times = iter([second for pair in trials for _ in range(3) for second in pair])
    monkeypatch.setattr(latency, "_decode_s", lambda *_: next(times))
    done: list[int] = []
    result = measure_latency(
        base, PROMPT, adapter="default", new_tokens=5, trials=3, progress=done.append
    )
    assert list(result) == ["base", "unmerged", "merged"]
    for found in result.values():
        assert found.first_token_ms == pytest.approx(200)
        assert found.ms_per_token == pytest.approx(150)
    assert done == [1] * 12


def test_every_trial_decodes_as_many_tokens_as_asked(monkeypatch):
    base = tiny_base()
    attach(base, tiny_plan())
    # EOS is always the likeliest token, and still held back.
    base.model.lm_head.weight.data[:] = 0
    base.model.lm_head.weight.data[base.tokenizer.eos_token_id] = 1e-3
    lengths = []
    generate = base.model.generate
    monkeypatch.setattr(
        base.model, "generate", lambda **kw: lengths.append(generate(**kw).shape[1]) or None
    )
    result = measure_latency(base, PROMPT, adapter="default", new_tokens=4, trials=1)
    assert lengths == [len(PROMPT) + 1, len(PROMPT) + 4] * 6
    assert all(isinstance(found, Latency) for found in result.values())
    assert all(found.first_token_ms > 0 for found in result.values())


def test_frozen_weights_come_back_bit_for_bit_even_after_an_error(monkeypatch):
    base = tiny_base()
    attach(base, tiny_plan())
    digest = base.weights_digest()
    parameters = {name: id(value) for name, value in base.model.named_parameters()}
    calls = []

    def fails_in_the_merged_variant(*_: object) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(latency, "_decode_s", fails_in_the_merged_variant)
    with pytest.raises(KeyboardInterrupt):
        measure_latency(base, PROMPT, adapter="default", new_tokens=2, trials=1)
    assert base.weights_digest() == digest
    assert {name: id(value) for name, value in base.model.named_parameters()} == parameters
