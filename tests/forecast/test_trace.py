"""What is predicted without weights is what the same accounting finds of the real code."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from geometries import TINY
from loracle.config.files import load_config
from loracle.forecast.meta_base import fake_tensors, fill, meta_adapter, meta_base
from loracle.forecast.trace import synthetic_examples, trace_answers, trace_scoring, trace_step
from loracle.model.adapters import attach_adapter
from loracle.model.inventory import inventory_of
from loracle.model.load import load_base
from loracle.model.whole import whole_model
from loracle.placement import resolve_placement
from tiny import save_tiny_model

CPU = torch.device("cpu")
PLACEMENTS = (
    "all-linear", "attention", "attention-qv", "feed-forward", "output-projections",
    "first-1", "last-1", "lm-head", "full",
)  # fmt: skip
SHAPES = {"short": [(5, 9)] * 3, "long and short": [(30, 60), (3, 4), (20, 2)]}


def settings(placement="all-linear", *, quantization=None, **changed):
    config = load_config("demo")
    lora = config.lora.model_copy(update={"placement": placement, "rank": 4, "alpha": 8.0})
    train = config.train.model_copy(update={"micro_batch_tokens": 64, **changed})
    changes = {"lora": lora, "train": train, "quantization": quantization}
    return config.model_copy(update=changes)


def plan_of(base, config):
    lora = config.lora
    return resolve_placement(
        lora.placement, inventory=inventory_of(base.model), rank=lora.rank, alpha=lora.alpha
    )


def predicted(architecture, config, *, dtype, take):
    trains = config.lora.placement == "full"
    base = meta_base(architecture, dtype=dtype, trains=trains, quantization=config.quantization)
    adapter = meta_adapter(base, plan=plan_of(base, config), dropout=config.lora.dropout)
    with fake_tensors():
        return take(base, fill(base, adapter))


def real(folder, config, *, dtype, take):
    base = load_base(
        folder,
        device=CPU,
        dtype=dtype,
        trains=config.lora.placement == "full",
        quantization=config.quantization,
    )
    plan = plan_of(base, config)
    if plan.is_full:
        adapter = whole_model(base, name="default", plan=plan)
    else:
        adapter = attach_adapter(
            base, name="default", plan=plan, dropout=config.lora.dropout, seed=0,
            model_source="real",
        )  # fmt: skip
    return take(base, adapter)


def step_of(config, examples):
    return lambda base, adapter: trace_step(base, adapter=adapter, config=config, examples=examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("planned") / "model", layers=2)


@pytest.fixture(scope="module")
def architecture(folder):
    return AutoModelForCausalLM.from_pretrained(folder).config.to_dict()


def assert_same(ours, theirs):
    assert ours.peak == pytest.approx(theirs.peak, rel=0.02)
    assert ours.rest == pytest.approx(theirs.rest, rel=0.02)
    assert sum(ours.parts.values()) == ours.peak
    assert set(ours.parts) == set(theirs.parts)
    assert ours.work.flops == theirs.work.flops
    assert ours.work.num_bytes == pytest.approx(theirs.work.num_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "dtype"), [("short", torch.bfloat16), ("long and short", torch.float32)]
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_that_is_pretended_takes_the_bytes_of_the_real_one(
    folder, architecture, placement, shape, dtype
):
    config, examples = settings(placement), synthetic_examples(SHAPES[shape])
    take = step_of(config, examples)
    assert_same(
        predicted(architecture, config, dtype=dtype, take=take),
        real(folder, config, dtype=dtype, take=take),
    )


@pytest.mark.parametrize(
    "changed", [{"gradient_checkpointing": True}, {"quantization": "nf4"}], ids=str
)
@pytest.mark.parametrize("placement", ["all-linear", "last-1", "attention-qv"])
def test_so_does_one_with_checkpointing_or_packed_weights(folder, architecture, placement, changed):
    config, examples = settings(placement, **changed), synthetic_examples(SHAPES["short"])
    take = step_of(config, examples)
    assert_same(
        predicted(architecture, config, dtype=torch.bfloat16, take=take),
        real(folder, config, dtype=torch.bfloat16, take=take),
    )


@pytest.mark.parametrize("placement", ["all-linear", "attention-qv", "lm-head"])
def test_so_does_scoring(folder, architecture, placement):
    config, examples = settings(placement), synthetic_examples(SHAPES["long and short"])

    def take(base, adapter):
        return trace_scoring(base, adapter=adapter, examples=examples)

    assert_same(
        predicted(architecture, config, dtype=torch.bfloat16, take=take),
        real(folder, config, dtype=torch.bfloat16, take=take),
    )


@pytest.mark.parametrize("placement", ["all-linear", "attention-qv"])
def test_so_does_answering(folder, architecture, placement):
    config = settings(placement)

    def take(base, adapter):
        return trace_answers(base, adapter=adapter, num_prompts=3, prompt_tokens=20, new_tokens=12)

    ours = predicted(architecture, config, dtype=torch.bfloat16, take=take)
    theirs = real(folder, config, dtype=torch.bfloat16, take=take)
    assert_same(ours.first, theirs.first)
    assert_same(ours.last, theirs.last)
    assert ours.last.rest > ours.first.rest


def test_parts_are_the_closed_form(architecture):
    config, examples = settings("attention"), synthetic_examples(SHAPES["short"])
    take = step_of(config, examples)
    found = predicted(architecture, config, dtype=torch.float32, take=take)
    plan = plan_of(meta_base(architecture, dtype=torch.float32), config)
    assert found.parts["adapters"] == 4 * plan.trainable_params
    moments = 8 * plan.trainable_params
    assert moments <= found.parts["optimizer"] <= moments + 8 * len(plan.modules)
    assert found.parts["weights"] >= 4 * plan.base_params


def test_arithmetic_is_the_closed_form(architecture):
    """Frozen products forward and for the input's gradient, twice for each factor and once more."""
    config = settings("all-linear", micro_batch_tokens=1000)
    shape = [(6, 10)]
    take = step_of(config, synthetic_examples(shape))
    found = predicted(architecture, config, dtype=torch.float32, take=take)
    base = meta_base(architecture, dtype=torch.float32)
    inventory, plan = inventory_of(base.model), plan_of(base, config)
    sizes = {m.name: m.in_features * m.out_features for m in inventory.modules}
    head = next(m for m in inventory.modules if m.role == "head")
    inner = sum(size for name, size in sizes.items() if name != head.name)
    tokens, targets = 16, 10
    # The lowest layer's inputs need no gradient: q, k and v of layer 0.
    lowest = sum(
        m.in_features * m.out_features
        for m in inventory.modules
        if m.layer == 0 and m.kind in ("q_proj", "k_proj", "v_proj")
    )
    low_rank_lowest = sum(
        4 * m.in_features for m in plan.modules
        if m.layer == 0 and m.kind in ("q_proj", "k_proj", "v_proj")
    )  # fmt: skip
    products = 2 * tokens * (2 * inner - lowest) + 2 * targets * 2 * sizes[head.name]
    adapters = 2 * tokens * (3 * plan.trainable_params - low_rank_lowest)
    attention = found.work.flops - products - adapters
    assert 0 <= attention <= 0.1 * found.work.flops


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_can_be_planned_without_weights(family):
    config = settings("all-linear")
    take = step_of(config, synthetic_examples(SHAPES["short"]))
    found = predicted(TINY[family], config, dtype=torch.float32, take=take)
    assert found.peak > found.rest > found.parts["weights"]


@pytest.mark.parametrize("kind", ["gpu", "old gpu"])
@pytest.mark.parametrize("placement", ["all-linear", "last-1"])
def test_a_gpu_s_code_can_be_traced_on_a_cpu(architecture, placement, kind):
    """Its attention is another kernel; everything else is what a CPU does."""
    dtype = torch.bfloat16 if kind == "gpu" else torch.float16
    config, examples = settings(placement), synthetic_examples(SHAPES["long and short"])
    base = meta_base(architecture, dtype=dtype)
    adapter = meta_adapter(base, plan=plan_of(base, config), dropout=0.1)
    with fake_tensors(kind):
        found = trace_step(base, adapter=adapter, config=config, examples=examples)
    elsewhere = predicted(architecture, config, dtype=dtype, take=step_of(config, examples))
    assert found.peak == pytest.approx(elsewhere.peak, rel=0.05)
    assert found.rest == pytest.approx(elsewhere.rest, rel=0.02)
    # The arithmetic of the CPU's attention kernel is not counted.
    assert found.work.flops > elsewhere.work.flops


def test_blocks_are_rounded_up_as_an_allocator_does(architecture):
    config, examples = settings("all-linear"), synthetic_examples(SHAPES["short"])

    def take(base, adapter):
        return trace_step(base, adapter=adapter, config=config, examples=examples, granule=512)

    found = predicted(architecture, config, dtype=torch.float32, take=take)
    plain = predicted(architecture, config, dtype=torch.float32, take=step_of(config, examples))
    assert found.peak % 512 == 0
    assert found.peak > plain.peak
