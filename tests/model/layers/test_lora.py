"""The routed layer computes what PEFT computes, per run, and keeps runs apart."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loracle.config.run import PlacementConfig
from loracle.data import Example
from loracle.data.packing import pack
from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.model.layers.dropout import DropoutStream, keep_bits, threshold_of
from loracle.model.layers.lora import Route, RoutedLinear, _RoutedProduct
from tiny_engine import (
    CPU,
    FAMILIES,
    attach,
    base_of,
    examples_of,
    packed_nll,
    peft_tensors,
    stock_model,
    stock_nll,
    stock_peft,
    tiny_base,
    tiny_plan,
)

EVERYTHING_IN_LLAMA = PlacementConfig(modules=["q_proj", "o_proj", "down_proj", "lm_head"])


def gradients(base: FrozenBase, adapter: Adapter, examples: Sequence[Example], **route):
    """Mean loss of one packed row and its gradients by tensor name."""
    nll = base.token_nll(pack(examples), routes=(Route(adapter.name, **route),))
    loss = nll.mean()
    grads = torch.autograd.grad(loss, list(adapter.parameters.values()))
    return loss, dict(zip(adapter.parameters, grads, strict=True))


def peft_gradients(model, plan, adapter: Adapter, examples: Sequence[Example]):
    """The same through stock PEFT, a sequence at a time."""
    peft = stock_peft(model, plan, like=adapter)
    loss = torch.cat([stock_nll(peft, example) for example in examples]).mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in peft_tensors(peft).items()}


def assert_relatively_close(
    candidate: dict[str, Tensor], reference: dict[str, Tensor], *, to: float
):
    assert candidate.keys() == reference.keys()
    for name, expected in reference.items():
        assert expected.norm() > 0, name
        assert (candidate[name] - expected).norm() <= to * expected.norm(), name


@pytest.mark.parametrize("placement", ["all-linear", "head-too"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_stock_peft(family, placement):
    stock, examples = stock_model(family), examples_of(5)
    if placement == "head-too":
        placement = PlacementConfig(modules=[m.name for m in inventory_of(stock).modules])
    plan = tiny_plan(placement, family=family)
    base = base_of(stock)
    adapter = attach(base, plan)
    loss, candidate = gradients(base, adapter, examples)
    their_loss, reference = peft_gradients(stock, plan, adapter, examples)
    assert abs(loss.item() - their_loss.item()) <= 1e-5 * their_loss.item()
    assert_relatively_close(candidate, reference, to=1e-5)


def test_ranks_and_scalings_that_differ_between_modules_are_pefts():
    stock, examples = stock_model("phi"), examples_of(4)
    plan = tiny_plan(family="phi")
    changed = [
        replace(module, rank=1 + index % 5, alpha=3.0 + index)
        for index, module in enumerate(plan.modules)
    ]
    plan = replace(plan, modules=tuple(changed))
    base = base_of(stock)
    adapter = attach(base, plan)
    loss, candidate = gradients(base, adapter, examples)
    their_loss, reference = peft_gradients(stock, plan, adapter, examples)
    assert abs(loss.item() - their_loss.item()) <= 1e-5 * their_loss.item()
    assert_relatively_close(candidate, reference, to=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_without_a_router_in_use_it_is_pefts_own_forward(family, monkeypatch):
    base = tiny_base(family)
    plan = tiny_plan(family=family)
    adapter = attach(base, plan)
    peft = stock_peft(stock_model(family), plan, like=adapter)
    ids = torch.tensor([examples_of(1)[0].input_ids])
    base.model.set_attn_implementation("sdpa")

    def never(*_: object) -> None:
        raise AssertionError("routed")

    monkeypatch.setattr(_RoutedProduct, "apply", never)
    assert base.router.routes is None
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, peft(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_routes_it_is_the_base_bit_for_bit(family):
    base, row = tiny_base(family), pack(examples_of(4))
    with torch.no_grad():
        before = packed_nll(base, row)
        adapter = attach(base, tiny_plan(family=family))
        after = packed_nll(base, row)
        through = packed_nll(base, row, adapter=adapter.name)
    assert torch.equal(before, after)
    assert (through - before).abs().max() > 1e-3


def test_a_fresh_adapter_changes_nothing():
    base, row = tiny_base(), pack(examples_of(4))
    attach(base, tiny_plan(), spread_b=None)
    with torch.no_grad():
        assert torch.equal(packed_nll(base, row), packed_nll(base, row, adapter="default"))


def test_adapters_in_one_base_do_not_leak_into_each_other():
    stock, examples = stock_model(), examples_of(5)
    plans = {"one": tiny_plan(rank=3), "two": tiny_plan(EVERYTHING_IN_LLAMA, rank=5, alpha=2)}
    base = base_of(stock)
    adapters = {n: attach(base, plan, name=n, seed=i) for i, (n, plan) in enumerate(plans.items())}
    for name, plan in plans.items():
        loss, candidate = gradients(base, adapters[name], examples)
        their_loss, reference = peft_gradients(stock, plan, adapters[name], examples)
        assert abs(loss.item() - their_loss.item()) <= 1e-5 * their_loss.item()
        assert_relatively_close(candidate, reference, to=1e-5)


def test_runs_that_share_a_row_get_what_they_get_alone():
    stock = stock_model()
    plans = {"one": tiny_plan(rank=3), "two": tiny_plan(EVERYTHING_IN_LLAMA, rank=5, alpha=2)}
    base = base_of(stock)
    adapters = {n: attach(base, plan, name=n, seed=i) for i, (n, plan) in enumerate(plans.items())}
    mine, nobodys, reference = examples_of(3), examples_of(2, seed=1), examples_of(4, seed=2)
    row = pack([*mine, *nobodys, *reference])
    first = sum(e.num_tokens for e in mine)
    second = first + sum(e.num_tokens for e in nobodys)
    nll = base.token_nll(
        row, routes=(Route("one", stop=first), Route("two", start=second, stop=row.num_tokens))
    )
    parts = nll.split([sum(e.num_targets for e in group) for group in (mine, nobodys, reference)])
    (parts[0].mean() + parts[2].mean()).backward()
    torch.testing.assert_close(parts[1], packed_nll(base, pack(nobodys)), rtol=0, atol=1e-5)
    for name, group, part in (("one", mine, parts[0]), ("two", reference, parts[2])):
        loss, alone = peft_gradients(stock, plans[name], adapters[name], group)
        assert abs(part.mean().item() - loss.item()) <= 1e-5 * loss.item()
        together = {key: value.grad for key, value in adapters[name].parameters.items()}
        assert_relatively_close(together, alone, to=1e-5)


def masked_reference(layer: RoutedLinear, x: Tensor, route: Route) -> Tensor:
    """The layer in plain PyTorch, with the mask of the route."""
    bits = keep_bits((route.dropout,), module=layer.module_name, features=x.shape[1], device=CPU)
    a, b = layer.lora_A[route.adapter].weight, layer.lora_B[route.adapter].weight
    update = (x * bits.bool() * route.dropout.scale) @ a.T @ b.T
    return layer.get_base_layer()(x) + layer.scaling[route.adapter] * update


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.attn.c_attn")],
)
def test_dropout_masks_the_adapters_input_and_only_that(family, name):
    base = tiny_base(family)
    attach(base, tiny_plan(family=family))
    layer = base.model.get_submodule(name)
    assert layer.module_name == name
    x = torch.randn(20, layer.in_features, requires_grad=True)
    route = Route("default", dropout=DropoutStream(threshold_of(0.4), 0, 3, (0, 2), (12, 8)))
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with base.router.following((route,)):
        candidate = layer(x)
    reference = masked_reference(layer, x, route)
    torch.testing.assert_close(candidate, reference)
    weights = torch.randn_like(candidate)
    for got, expected in zip(
        torch.autograd.grad((candidate * weights).sum(), inputs),
        torch.autograd.grad((reference * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_the_written_gradient_is_the_numerical_one():
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    tokens, features, out = 11, 4, 3
    weight, bias = drawn(out, features).detach(), drawn(out).detach()
    # Tokens 4 and 5 belong to nobody; ranks and scales differ.
    routes = (
        Route("a", 0, 4, DropoutStream(threshold_of(0.5), 0, 0, (0, 1), (1, 3))),
        Route("b", 6, None, DropoutStream(threshold_of(0.3), 1, 0, (0,), (5,))),
        Route("c", 4, 4, None),
    )
    scales = (2.0, 0.5, 1.0)
    factors = [f for rank in (1, 3, 2) for f in (drawn(rank, features), drawn(out, rank))]

    def product(x: Tensor, *factors: Tensor) -> Tensor:
        return _RoutedProduct.apply(x, weight, bias, "m", routes, scales, *factors)

    assert torch.autograd.gradcheck(product, (drawn(tokens, features), *factors))


def test_a_gap_without_a_route_gets_the_base():
    base = tiny_base()
    attach(base, tiny_plan())
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(9, 32)
    with base.router.following((Route("default", 2, 5),)):
        out = layer(x)
    plain = layer.get_base_layer()(x)
    assert torch.equal(out[:2], plain[:2])
    assert torch.equal(out[5:], plain[5:])
    assert not torch.isclose(out[2:5], plain[2:5]).all()


@pytest.mark.parametrize("shape", [(32,), (7, 32), (2, 5, 32)])
def test_any_leading_shape_goes_through(shape):
    base = tiny_base()
    attach(base, tiny_plan())
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(shape)
    with base.router.following((Route("default"),)):
        routed = layer(x)
    assert routed.shape == shape
    torch.testing.assert_close(routed, layer(x))


def test_half_precision_is_what_autocast_does():
    stock, plan = stock_model(dtype=torch.bfloat16), tiny_plan()
    base = base_of(stock)
    adapter = attach(base, plan)
    assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(6, 32, dtype=torch.bfloat16)
    with base.router.following((Route("default"),)):
        candidate = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = layer(x)
    assert candidate.dtype == torch.bfloat16
    torch.testing.assert_close(candidate, reference.bfloat16(), rtol=2**-7, atol=2**-7)


def test_scores_without_a_gradient_are_in_pefts_own_precision():
    """Bit for bit: what a run records of its adapter is what stock PEFT says of it."""
    base = tiny_base(dtype=torch.bfloat16)
    attach(base, tiny_plan(), spread_b=0.3)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = [layer for layer in base.model.modules() if isinstance(layer, RoutedLinear)]
    candidate, pefts = [], []
    with torch.no_grad():
        for layer in (layer for layer in layers if layer.in_features == 32):
            pefts.append(layer(x))
            with base.router.following([Route("default")]):
                candidate.append(layer(x))
    assert len(candidate) > 3
    assert all(torch.equal(one, other) for one, other in zip(candidate, pefts, strict=True))


def test_routes_end_with_their_block_even_after_an_error():
    router = tiny_base().router
    with router.following((Route("outer"),)):
        with router.following(()):
            assert router.routes == ()
        assert router.routes == (Route("outer"),)
        with pytest.raises(KeyError), router.following(()):
            raise KeyError
        assert router.routes == (Route("outer"),)
    assert router.routes is None


def test_nothing_is_kept_for_the_base_alone():
    base = tiny_base()
    attach(base, tiny_plan())
    with torch.no_grad():
        assert packed_nll(base, pack(examples_of(2))).grad_fn is None
    assert not packed_nll(base, pack(examples_of(2))).requires_grad


def test_a_copy_of_the_base_is_not_needed_for_a_second_adapter():
    base = tiny_base()
    before = copy.deepcopy(dict(base.frozen_weights()))
    attach(base, tiny_plan(), name="one")
    attach(base, tiny_plan("attention"), name="two")
    after = dict(base.frozen_weights())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
