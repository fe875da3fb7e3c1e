"""A small random model of an architecture says what a run would: before weights, in its words."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from geometries import LATENT, TINY, UNUSUAL
from loracle.config.files import load_config
from loracle.errors import ModelError
from loracle.forecast.cases import PlannedArms, predict_cases
from loracle.forecast.devices import DEVICES, Device
from loracle.forecast.meta_base import model_without_weights
from loracle.forecast.small_model import has_plain_head, small_base
from loracle.forecast.trace import synthetic_examples, trace_scoring, trace_step
from loracle.model.adapters import attach_adapter
from loracle.model.guard import checked
from loracle.model.inventory import inventory_from_architecture, transformers_config
from loracle.placement import resolve_placement
from tiny_engine import base_of

CPU = Device("cpu", 64, has_bf16=False, is_gpu=False)
GRANITE = TINY["llama"] | {"model_type": "granite", "logits_scaling": 8.0}
GPT_NEO = {
    "model_type": "gpt_neo",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global"], 2]],
    "max_position_embeddings": 64,
}
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "expand": 2,
    "state_size": 8,
    "n_groups": 1,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
}
SHORT = [
    "data.max_tokens=32",
    "train.batch_size=2",
    "eval.batch_tokens=128",
    "eval.max_new_tokens=8",
    "eval.generate_batch_size=2",
]


def plan_of(architecture, placement="all-linear"):
    inventory = inventory_from_architecture(architecture)
    return resolve_placement(placement, inventory=inventory, rank=4, alpha=8.0)


def planned(architecture, *settings, device=CPU, placement="all-linear"):
    config = load_config(overrides=["model=theirs", *SHORT, *settings])
    plan = plan_of(architecture, placement)
    arms = PlannedArms("one", config, architecture, {placement: plan}, {placement: 1}, ())
    (found,) = predict_cases(arms, [(placement, config)], device=device, rates=None)
    return found


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (UNUSUAL["rwkv"], "change each other's loss"),
        (GPT_NEO, "does not take its attention from Transformers' interface"),
        (
            TINY["gemma"] | {"model_type": "gemma2", "query_pre_attn_scalar": 8},
            "soft-capping and sinks are not supported",
        ),
    ],
    ids=["rwkv", "gpt_neo", "gemma2"],
)
def test_what_a_run_refuses_is_refused_in_its_words(architecture, said):
    with pytest.raises(ModelError, match=said):
        small_base(architecture, name="theirs")


def test_positions_that_end_are_told_with_the_setting():
    with pytest.raises(ModelError, match=r"set data\.max_tokens to at most 64"):
        planned(TINY["gpt2"], "data.max_tokens=65")


def test_a_module_without_a_gradient_is_named(monkeypatch):
    monkeypatch.setattr("loracle.forecast.trace.train_bundle", lambda *_, **__: [])
    with pytest.raises(ModelError, match=r"gives no gradient to .*layers\.0.*'all-linear' trains"):
        planned(TINY["llama"])


def test_a_library_s_fault_is_one_line(monkeypatch):
    def breaks(*_, **__):
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setattr("loracle.forecast.predict.trace_scoring", breaks)
    with pytest.raises(ModelError, match=r"^theirs: cannot be planned, though it may run \(no ker"):
        planned(TINY["gpt2"])


@pytest.mark.parametrize("device", [CPU, DEVICES["t4"], DEVICES["h100"]], ids=lambda d: d.name)
def test_experts_are_planned_in_every_dtype(device):
    assert planned(UNUSUAL["mixtral"], device=device).peak_gib > 0


def test_a_configuration_with_infinity_is_read():
    assert inventory_from_architecture(MAMBA2).num_layers == 2


def test_latent_attention_is_planned():
    assert planned(LATENT, placement="attention").peak_gib > 0


def test_logits_of_its_own_are_counted_as_they_are_made():
    """Granite scales its logits: no fast head, so every target's logits live at once."""
    architecture = GRANITE | {"vocab_size": 8000}
    assert not has_plain_head(architecture)
    assert has_plain_head(TINY["gpt2"])
    examples = synthetic_examples([(4, 30)] * 4)
    config = load_config(overrides=["train.micro_batch_tokens=256"])
    plan = plan_of(architecture)
    found = small_base(architecture, name="granite")
    real = small_of(architecture)
    adapter = attach_adapter(
        real, name="default", plan=plan, dropout=0.1, seed=0, model_source="granite"
    )
    with model_without_weights(
        architecture, plan=plan, device=CPU, dtype=torch.float32, dropout=0.1
    ) as (base, pretended):
        assert base.plain_head == found.plain_head is False
        step = trace_step(base, adapter=pretended, config=config, examples=examples)
        scored = trace_scoring(base, adapter=pretended, examples=examples)
    theirs = trace_step(real, adapter=adapter, config=config, examples=examples)
    assert step.peak == pytest.approx(theirs.peak, rel=0.02)
    assert scored.peak == pytest.approx(
        trace_scoring(real, adapter=adapter, examples=examples).peak, rel=0.02
    )


def small_of(architecture):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers_config(architecture)
        return checked(base_of(AutoModelForCausalLM.from_config(config, dtype=torch.float32)))
