"""Many runs multiplied at once get what each gets by itself."""

import pytest
import torch
from torch import Tensor

from engine.test_train import assert_same, bundle_and_alone, losses, members
from loracle.model.layers import lora
from loracle.model.layers.dropout import DropoutStream, threshold_of
from loracle.model.layers.lora import Route, routed_product
from loracle.model.layers.stacked import stacked_product
from tiny_engine import tiny_base

TOKENS, FEATURES, OUT = 23, 6, 5
RANKS, SCALES = (2, 4, 1), (2.0, 0.5, 1.0)


def stream(p: float, *, seed: int, lengths: tuple[int, ...]) -> DropoutStream:
    return DropoutStream(threshold_of(p), seed, 3, tuple(range(len(lengths))), lengths)


DROPPING = (
    Route("a", 2, 9, stream(0.5, seed=0, lengths=(3, 4))),
    Route("b", 9, 14, None),
    # Tokens 14 to 16 belong to nobody.
    Route("c", 17, None, stream(0.1, seed=1, lengths=(6,))),
)
WHOLE = (Route("a", 0, 9), Route("b", 9, 14), Route("c", 14, 23))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    factors = [f for rank in RANKS for f in (drawn(rank, FEATURES), drawn(OUT, rank))]
    x, weight, bias = drawn(TOKENS, FEATURES), drawn(OUT, FEATURES), drawn(OUT)
    if dtype == torch.bfloat16:
        factors = [factor.float() for factor in factors]
    return x, weight, bias, factors


def outcome(product, routes, *, dtype=torch.float64) -> list[Tensor]:
    x, weight, bias, factors = inputs(dtype)
    factors = factors[: 2 * len(routes)]
    leaves = [tensor.requires_grad_() for tensor in (x, *factors)]
    out = product(x, weight, bias, "m", routes, SCALES[: len(routes)], *factors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("routes", [DROPPING, WHOLE], ids=["dropout and gaps", "neither"])
def test_output_and_every_gradient_are_those_of_run_by_run(routes):
    together, alone = outcome(stacked_product, routes), outcome(routed_product, routes)
    assert len(together) == 2 + 2 * len(RANKS)
    for candidate, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(candidate, expected, rtol=1e-6, atol=1e-6)


def test_in_bf16_only_the_rounding_differs():
    together, alone = (
        outcome(product, DROPPING, dtype=torch.bfloat16)
        for product in (stacked_product, routed_product)
    )
    exact = outcome(routed_product, DROPPING)
    for candidate, reference, expected in zip(together, alone, exact, strict=True):
        rounding = (reference.double() - expected).norm()
        assert (candidate.double() - expected).norm() <= 1.5 * rounding + 0.005 * expected.norm()
    assert [grad.dtype for grad in together[2:]] == [torch.float32] * 2 * len(RANKS)


def test_the_written_gradient_is_the_numerical_one():
    x, weight, bias, factors = inputs()

    def product(x: Tensor, *factors: Tensor) -> Tensor:
        return stacked_product(x, weight, bias, "m", DROPPING, SCALES, *factors)

    assert torch.autograd.gradcheck(product, tuple(t.requires_grad_() for t in (x, *factors)))


def test_a_run_does_not_feel_the_others():
    x, weight, bias, factors = inputs()
    before = stacked_product(x, weight, bias, "m", DROPPING, SCALES, *factors)
    changed = [factors[0] + 1, factors[1] + 1, *factors[2:]]
    after = stacked_product(x, weight, bias, "m", DROPPING, SCALES, *changed)
    assert not torch.equal(before[2:9], after[2:9])
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[9:], after[9:])


def test_no_input_gradient_is_made_where_none_is_needed():
    x, weight, bias, factors = inputs()
    leaves = [factor.requires_grad_() for factor in factors]
    out = stacked_product(x, weight, bias, "m", DROPPING, SCALES, *factors)
    out.sum().backward()
    assert x.grad is None
    assert all(leaf.grad is not None for leaf in leaves)


def test_overlapping_runs_cannot_be_stacked():
    with pytest.raises(AssertionError, match="overlap"):
        outcome(stacked_product, (WHOLE[1], WHOLE[0], WHOLE[2]))


def test_a_gpu_stacks_and_a_cpu_does_not():
    assert lora.stacks_runs(torch.device("cuda"))
    assert not lora.stacks_runs(torch.device("cpu"))


def test_each_run_of_a_stacked_bundle_trains_as_it_does_alone(monkeypatch):
    """Different modules, ranks, dropouts, rates and lengths; the runs alone are not stacked."""
    monkeypatch.setattr(lora, "stacks_runs", lambda _: True)
    bundle = members("llama", down="down_proj", attention="v_proj")
    result = bundle_and_alone(bundle, base_of_run=tiny_base, micro_batch_tokens=100_000)
    for mine, adapter, alone, alone_adapter in result:
        assert losses(mine) == pytest.approx(losses(alone), rel=1e-5)
        assert_same(adapter, alone_adapter, to=1e-3)
