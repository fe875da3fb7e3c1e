"""What is predicted without weights is what the same accounting finds of the real step."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from geometries import TINY
from loracle.configfile import load_config
from loracle.model.adapters import attach_adapter
from loracle.model.base import load_base
from loracle.model.inventory import inventory_of
from loracle.model.whole import whole_model
from loracle.placement import resolve_placement
from loracle.plan.pretend import fill, pretend_adapter, pretend_base, pretending
from loracle.plan.trace import made_up_examples, trace_steps

CPU = torch.device("cpu")
PLACEMENTS = (
    "all-linear", "attention", "attention-qv", "feed-forward", "output-projections",
    "first-1", "last-1", "lm-head", "full",
)  # fmt: skip
SHAPES = {"short": [(5, 9)] * 4, "long and short": [(30, 60), (3, 4), (20, 2)]}


def settings(placement, **changed):
    config = load_config("demo")
    lora = config.lora.model_copy(update={"placement": placement, "rank": 4, "alpha": 8.0})
    train = config.train.model_copy(update={"micro_batch_tokens": 64, **changed})
    return config.model_copy(update={"lora": lora, "train": train})


def plan_of(base, config):
    lora = config.lora
    return resolve_placement(
        lora.placement, inventory=inventory_of(base.model), rank=lora.rank, alpha=lora.alpha
    )


def predicted(architecture, config, *, dtype, examples):
    trains = config.lora.placement == "full"
    base = pretend_base(architecture, dtype=dtype, trains=trains)
    adapter = pretend_adapter(base, plan=plan_of(base, config), dropout=config.lora.dropout)
    with pretending():
        adapter = fill(base, adapter)
        return trace_steps(base, adapter=adapter, config=config, examples=examples)


def real(folder, config, *, dtype, examples):
    base = load_base(folder, device=CPU, dtype=dtype, trains=config.lora.placement == "full")
    plan = plan_of(base, config)
    if plan.is_full:
        adapter = whole_model(base, name="default", plan=plan)
    else:
        adapter = attach_adapter(
            base,
            name="default",
            plan=plan,
            dropout=config.lora.dropout,
            seed=0,
            model_source="real",
        )
    return trace_steps(base, adapter=adapter, config=config, examples=examples)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("planned") / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_that_is_pretended_takes_the_bytes_of_the_real_one(folders, placement, shape, dtype):
    config, examples = settings(placement), made_up_examples(SHAPES[shape])
    architecture = AutoModelForCausalLM.from_pretrained(folders).config.to_dict()
    ours = predicted(architecture, config, dtype=dtype, examples=examples)
    theirs = real(folders, config, dtype=dtype, examples=examples)
    assert ours.peak == pytest.approx(theirs.peak, rel=0.02)
    assert ours.rest == pytest.approx(theirs.rest, rel=0.02)
    assert sum(ours.parts.values()) == ours.peak
    assert set(ours.parts) == set(theirs.parts)


def test_parts_are_the_closed_form(folders):
    config = settings("attention")
    architecture = AutoModelForCausalLM.from_pretrained(folders).config.to_dict()
    examples = made_up_examples(SHAPES["short"])
    found = predicted(architecture, config, dtype=torch.float32, examples=examples)
    plan = plan_of(pretend_base(architecture, dtype=torch.float32), config)
    assert found.parts["adapters"] == 4 * plan.trainable_params
    moments = 8 * plan.trainable_params
    assert moments <= found.parts["optimizer"] <= moments + 8 * len(plan.modules)
    assert found.parts["weights"] >= 4 * plan.base_params


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_can_be_planned_without_weights(family):
    config = settings("all-linear")
    examples = made_up_examples(SHAPES["short"])
    found = predicted(TINY[family], config, dtype=torch.float32, examples=examples)
    assert found.peak > found.rest > found.parts["weights"]
