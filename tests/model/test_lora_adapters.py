"""Adapters start from a stream of each module's own, as PEFT draws, and are saved by PEFT."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file

from loracle.data.packing import pack
from loracle.errors import ModelError
from loracle.model.adapters import (
    attach_adapter,
    initial_a,
    load_adapter,
    peft_config_of,
    save_adapter,
)
from loracle.placement import ModulePlan
from loracle.screen import quiet_transformers
from tiny_engine import attach, examples_of, packed_nll, stock_model, tiny_base, tiny_plan

DOWN = "model.layers.1.mlp.down_proj"
WEIGHTS = "adapter_model.safetensors"


def initial(plan: ModulePlan, *, seed: int = 0, family: str = "llama") -> dict[str, torch.Tensor]:
    adapter = attach(tiny_base(family), plan, seed=seed, spread_b=None)
    return {name: parameter.detach() for name, parameter in adapter.parameters.items()}


def test_a_shared_module_starts_alike_in_every_placement():
    everything, mlp = initial(tiny_plan()), initial(tiny_plan("feed-forward"))
    shared = [name for name in mlp if name.endswith("lora_A")]
    assert len(shared) == 9
    assert all(torch.equal(everything[name], mlp[name]) for name in shared)


def test_modules_and_seeds_differ():
    one, other = initial(tiny_plan()), initial(tiny_plan(), seed=1)
    first, second = "model.layers.0.mlp.up_proj.lora_A", "model.layers.0.mlp.gate_proj.lora_A"
    assert not torch.isclose(one[first], one[second]).any()
    assert not torch.isclose(one[first], other[first]).any()


def test_a_smaller_rank_is_the_top_of_a_larger_one():
    small, large = initial(tiny_plan(rank=2)), initial(tiny_plan(rank=8))
    for name in small:
        if name.endswith("lora_A"):
            assert torch.equal(small[name], large[name][:2])


def test_what_is_attached_is_the_drawn_a_and_a_zero_b():
    tensors = initial(tiny_plan(rank=4))
    a = initial_a(DOWN, rank=4, features=48, seed=0)
    assert torch.equal(tensors[f"{DOWN}.lora_A"], a)
    assert not any(value.any() for name, value in tensors.items() if name.endswith("lora_B"))


def test_a_second_adapter_does_not_shift_the_first_ones_draws():
    base = tiny_base()
    attach(base, tiny_plan("attention"), name="one", seed=5)
    second = attach(base, tiny_plan(), name="two", spread_b=None)
    alone = initial(tiny_plan())
    assert all(torch.equal(second.parameters[name], alone[name]) for name in alone)


def peft_draws(rank: int, features: int) -> torch.Tensor:
    """lora_A as PEFT initialises it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = PeftLinear(
            torch.nn.Linear(features, 8), adapter_name="default", config=LoraConfig(r=rank), r=rank
        )
    return layer.lora_A["default"].weight.detach()


def test_the_distribution_is_that_of_peft():
    rank, features = 64, 1000
    candidate, reference = (
        initial_a("m", rank=rank, features=features, seed=0),
        peft_draws(rank, features),
    )
    bound = 1 / math.sqrt(features)
    for drawn in (candidate, reference):
        values = drawn.double() / bound
        count = values.numel()
        assert values.abs().max() <= 1
        assert values.abs().max() > 0.999
        # Moments of uniform(-1, 1): 0, 1/3, 1/5; their sampling errors from the next ones.
        assert abs(values.mean()) < 5 * math.sqrt(1 / 3 / count)
        assert abs((values**2).mean() - 1 / 3) < 5 * math.sqrt((1 / 5 - 1 / 9) / count)
        assert abs((values**4).mean() - 1 / 5) < 5 * math.sqrt((1 / 9 - 1 / 25) / count)


def test_only_the_adapter_trains():
    base = tiny_base("gpt2")
    adapter = attach(base, tiny_plan(family="gpt2"))
    training = {id(p) for p in base.model.parameters() if p.requires_grad}
    assert training == {id(p) for p in adapter.parameters.values()}
    assert sum(p.numel() for p in adapter.parameters.values()) == adapter.plan.trainable_params


def test_every_adapter_trains_after_another_was_added():
    base = tiny_base()
    adapters = [attach(base, tiny_plan(), name=name) for name in ("one", "two")]
    assert all(p.requires_grad for adapter in adapters for p in adapter.parameters.values())
    assert not base.model.training


def test_the_tensors_stand_in_the_plans_order():
    plan = tiny_plan()
    names = [f"{m.name}.lora_{ab}" for m in plan.modules for ab in "AB"]
    assert list(initial(plan)) == names


@pytest.mark.parametrize(("family", "name"), [("llama", "default"), ("gpt2", "seed-3")])
def test_what_is_saved_loads_in_stock_peft(family, name, tmp_path):
    base, plan = tiny_base(family), tiny_plan(family=family)
    attach(base, plan, name=name)
    written = save_adapter(base, name=name, folder=tmp_path)
    assert written == (tmp_path if name == "default" else tmp_path / name)
    with quiet_transformers():
        peft = PeftModel.from_pretrained(stock_model(family), str(written)).eval()
    ids = torch.tensor([examples_of(1)[0].input_ids])
    with torch.no_grad(), base.generating(()):
        plain = base.model(input_ids=ids).logits
    base.router.routes = None
    base.model.set_attn_implementation("sdpa")
    base.peft.set_adapter(name)
    with torch.no_grad():
        candidate, reference = base.model(input_ids=ids).logits, peft(input_ids=ids).logits
    assert torch.equal(candidate, reference)
    assert not torch.allclose(candidate, plain)


def test_saving_writes_the_same_bytes_and_only_what_is_needed(tmp_path):
    contents = []
    for part in ("first", "second"):
        base = tiny_base()
        attach(base, tiny_plan())
        written = save_adapter(base, name="default", folder=tmp_path / part)
        contents.append({path.name: path.read_bytes() for path in written.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {WEIGHTS, "adapter_config.json"}
    config = json.loads(contents[0]["adapter_config.json"])
    assert config["target_modules"] == sorted(config["target_modules"])
    assert list(config) == sorted(config)
    assert config["base_model_name_or_path"] == "tiny"


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path):
    base, plan = tiny_base(), tiny_plan(rank=3)
    saved = attach(base, plan)
    folder = save_adapter(base, name="default", folder=tmp_path)
    fresh = tiny_base()
    loaded = load_adapter(
        fresh, name="default", plan=plan, saved=folder / WEIGHTS, model_source="tiny"
    )
    for name, parameter in saved.parameters.items():
        assert torch.equal(parameter, loaded.parameters[name])
    row = pack(examples_of(3))
    with torch.no_grad():
        candidate = packed_nll(base, row, adapter="default")
        assert torch.equal(candidate, packed_nll(fresh, row, adapter="default"))


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_file_that_is_not_the_plans_is_refused(damage, tmp_path):
    base, plan = tiny_base(), tiny_plan()
    attach(base, plan)
    path = save_adapter(base, name="default", folder=tmp_path) / WEIGHTS
    tensors = load_file(path)
    key = f"base_model.model.{DOWN}.lora_A.weight"
    changed = {
        "missing": {name: tensor for name, tensor in tensors.items() if name != key},
        "extra": tensors | {f"{key}.more": torch.zeros(1)},
        "shape": tensors | {key: tensors[key][:2].contiguous()},
    }[damage]
    save_file(changed, path)
    with pytest.raises(ModelError, match=rf"^{WEIGHTS}: 1 tensors are not the plan's, first {key}"):
        load_adapter(tiny_base(), name="default", plan=plan, saved=path, model_source="tiny")


def test_a_layer_that_peft_leaves_out_is_named(monkeypatch):
    def forgetful(plan: ModulePlan, *, dropout: float) -> dict[str, object]:
        config = peft_config_of(plan, dropout=dropout)
        return config | {"target_modules": [n for n in config["target_modules"] if n != DOWN]}

    monkeypatch.setattr("loracle.model.adapters.peft_config_of", forgetful)
    with pytest.raises(ModelError, match=rf"^LlamaForCausalLM: PEFT put no adapter on {DOWN}, "):
        attach(tiny_base(), tiny_plan())


def test_dropout_is_recorded_for_whoever_loads_it(tmp_path):
    base = tiny_base()
    attach_adapter(base, name="default", plan=tiny_plan(), dropout=0.1, seed=0, model_source="tiny")
    folder = save_adapter(base, name="default", folder=tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.1
