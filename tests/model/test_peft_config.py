"""PEFT adapts exactly the plan: the same modules, ranks, scalings and counts, in every family."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from geometries import TINY
from loracle.config.run import PlacementConfig
from loracle.model.adapters import peft_config_of
from loracle.model.inventory import inventory_of
from loracle.placement import PRESETS, ModulePlan, resolve_placement
from placement.budgets import planned_under

QWEN3 = {"qwen3": TINY["qwen2"] | {"model_type": "qwen3", "head_dim": 8}}
SPLIT = ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi"]
FUSED = ["gpt2", "gpt_neox"]
NEEDS_SPLIT = ("attention-qv", "attention-qkv")
FIXED = [name for name in PRESETS if name != "lm-head"]
CASES = [(family, placement) for family in SPLIT for placement in FIXED] + [
    (family, placement) for family in FUSED for placement in FIXED if placement not in NEEDS_SPLIT
]


def tiny_model(family: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**(TINY | QWEN3)[family]))


def planned(plan: ModulePlan) -> dict[str, tuple[int, float]]:
    return {module.name: (module.rank, module.alpha / module.rank) for module in plan.modules}


def adapt(model: torch.nn.Module, plan: ModulePlan) -> dict[str, tuple[int, float]]:
    inject_adapter_in_model(LoraConfig(**peft_config_of(plan, dropout=0.0)), model)
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def trainable_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("family", "placement"), CASES)
def test_peft_adapts_exactly_the_planned_modules(family, placement):
    model = tiny_model(family)
    plan = resolve_placement(placement, inventory=inventory_of(model), rank=4, alpha=8)
    assert adapt(model, plan) == planned(plan)
    assert trainable_params(model) == plan.trainable_params


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_head_alone_can_be_adapted(family):
    model = tiny_model(family)
    plan = resolve_placement("lm-head", inventory=inventory_of(model), rank=2, alpha=4)
    assert list(adapt(model, plan)) == ["lm_head"]
    assert trainable_params(model) == plan.trainable_params == 2 * (32 + 64)


def test_ranks_and_alphas_per_module_reach_peft():
    model = tiny_model("llama")
    plan = resolve_placement("all-linear", inventory=inventory_of(model), rank=4, alpha=8)
    modules = list(plan.modules)
    modules[0] = replace(modules[0], rank=6, alpha=12.0)  # scaling held
    modules[9] = replace(modules[9], rank=2)  # alpha held
    modules[11] = replace(modules[11], alpha=5.0)
    mixed = replace(plan, modules=tuple(modules))
    assert adapt(model, mixed) == planned(mixed)
    assert trainable_params(model) == mixed.trainable_params


def test_a_pattern_is_for_its_module_alone():
    """``a.b`` as a regex also matches ``x.a.b`` and ``aXb``; the plan's keys do neither."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 4)
            self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})])

    model = Model()
    plan = resolve_placement("all-linear", inventory=inventory_of(model), rank=1, alpha=1)
    top, inner = plan.modules
    mixed = replace(plan, modules=(replace(top, rank=2, alpha=2.0), inner))
    assert adapt(model, mixed) == {"up": (2, 1.0), "blocks.0.up": (1, 1.0)}


def test_a_uniform_plan_needs_no_patterns():
    plan = resolve_placement(
        PlacementConfig(modules=["q_proj"], layers=[1]),
        inventory=inventory_of(tiny_model("llama")),
        rank=4,
        alpha=8,
    )
    assert peft_config_of(plan, dropout=0.1) == {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["model.layers.1.self_attn.q_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
    }


@pytest.mark.parametrize(("family", "placement"), CASES)
def test_under_a_budget_peft_counts_what_the_plan_does(family, placement):
    model = tiny_model(family)
    inventory = inventory_of(model)
    whole = resolve_placement("all-linear", inventory=inventory, rank=16, alpha=32)
    plan = planned_under(
        placement, inventory=inventory, reference_plan=whole, budget="equal-parameters"
    )
    assert adapt(model, plan) == planned(plan)
    assert trainable_params(model) == plan.trainable_params
    step = plan.trainable_params // plan.modules[0].rank
    assert 2 * abs(plan.trainable_params - whole.trainable_params) <= step


@pytest.mark.parametrize("family", [*SPLIT, *FUSED])
def test_counted_presets_and_single_kinds_reach_peft_in_every_family(family):
    inventory = inventory_of(tiny_model(family))
    kinds = dict.fromkeys(module.kind for module in inventory.modules if module.role != "head")
    for placement in ("first-1", "last-2", "every-2nd", *kinds):
        model = tiny_model(family)
        plan = resolve_placement(placement, inventory=inventory, rank=2, alpha=4)
        assert adapt(model, plan) == planned(plan)
        assert trainable_params(model) == plan.trainable_params


@pytest.mark.parametrize("family", [*SPLIT, *FUSED])
def test_ranks_by_kind_layer_and_name_reach_peft_in_every_family(family):
    model = tiny_model(family)
    inventory = inventory_of(model)
    first, *_, last = (module for module in inventory.modules if module.role != "head")
    ranks = {last.kind: 2, "layers:1": 5, first.name: 7}
    placement = PlacementConfig(modules=["*"], ranks=ranks)
    plan = resolve_placement(placement, inventory=inventory, rank=4, alpha=8)
    adapted = adapt(model, plan)
    assert adapted == planned(plan)
    assert {rank for rank, _ in adapted.values()} == {2, 4, 5, 7}
    assert {scaling for _, scaling in adapted.values()} == {2.0}
    assert trainable_params(model) == plan.trainable_params
