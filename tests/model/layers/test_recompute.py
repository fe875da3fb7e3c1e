"""Gradient checkpointing keeps less and changes no bit of a gradient."""

from collections import Counter

import pytest
import torch

from loracle.engine.train import train_bundle
from loracle.model.inventory import inventory_of
from loracle.model.live_bytes import LiveBytes
from loracle.model.trunk import TrunkStore
from loracle.model.whole import whole_model
from loracle.placement import resolve_placement
from tiny_engine import FAMILIES, attach, examples_of, tiny_base, tiny_plan, tiny_run

EXAMPLES = examples_of(9)


def gradients(
    checkpointing, *, family="llama", placement="all-linear", dtype=torch.float32, trunk=False
):
    """Loss and gradients of a step of two passes, with dropout."""
    base = tiny_base(family, dtype=dtype)
    if placement == "full":
        base.model = base.model.float().requires_grad_(True)
        base.trains = True
        plan = resolve_placement("full", inventory=inventory_of(base.model), rank=4, alpha=8.0)
        adapter = whole_model(base, name="default", plan=plan)
    else:
        adapter = attach(base, tiny_plan(placement, family=family))
    run = tiny_run(base, adapter, EXAMPLES, dropout=0.1, batch_size=5, max_grad_norm=None)
    result = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: result.update(
            {name: p.grad.clone() for name, p in adapter.parameters.items() if p.grad is not None}
        )
    )
    store = TrunkStore(base, memory_bytes=1 << 20) if trunk else None
    (record,) = next(
        train_bundle(base, [run], micro_batch_tokens=33, checkpointing=checkpointing, trunk=store)
    )
    return record.loss_nats_per_token, result


def assert_same_bits(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["all-linear", "last-1", "attention-qv", "lm-head", "full"])
def test_gradients_have_the_same_bits(placement, dtype):
    kept = gradients(False, placement=placement, dtype=dtype)
    assert_same_bits(gradients(True, placement=placement, dtype=dtype), kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_bits(family):
    assert_same_bits(gradients(True, family=family), gradients(False, family=family))


def test_with_kept_trunk_states_too():
    kept = gradients(False, placement="last-1", trunk=True)
    assert_same_bits(gradients(True, placement="last-1", trunk=True), kept)


def test_blocks_below_the_lowest_adapter_are_computed_once():
    base = tiny_base()
    adapter = attach(base, tiny_plan("last-1"))
    run = tiny_run(base, adapter, EXAMPLES, batch_size=2)
    calls = Counter()
    for index, block in enumerate(base.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    next(train_bundle(base, [run], micro_batch_tokens=1000, checkpointing=True))
    last = len(base.blocks) - 1
    assert calls == {index: 1 + (index == last) for index in range(last + 1)}
    assert all("forward" not in vars(block) for block in base.blocks)


def test_less_is_kept():
    peaks = {}
    for checkpointing in (False, True):
        base = tiny_base()
        run = tiny_run(base, attach(base, tiny_plan()), EXAMPLES, batch_size=9)
        with LiveBytes() as live:
            next(train_bundle(base, [run], micro_batch_tokens=1000, checkpointing=checkpointing))
        peaks[checkpointing] = live.peak_bytes
    assert peaks[True] < 0.75 * peaks[False]
