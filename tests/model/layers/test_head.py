"""The chunked loss under the frozen head is PyTorch's cross-entropy, value and gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from loracle.model.layers.head import CHUNK_ROWS, target_nll

SIZES = (0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 600)


def problem(count, *, dtype, bias, vocab=40, hidden=12):
    draw = torch.Generator().manual_seed(count)
    weight = torch.randn(vocab, hidden, generator=draw, dtype=torch.float64).to(dtype)
    shift = torch.randn(vocab, generator=draw, dtype=torch.float64).to(dtype) if bias else None
    x = torch.randn(count, hidden, generator=draw, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight, shift, torch.randint(vocab, (count,), generator=draw)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_cross_entropy(count, bias):
    hidden, weight, shift, targets = problem(count, dtype=torch.float64, bias=bias)
    candidate = target_nll(hidden, weight=weight, bias=shift, targets=targets)
    reference = cross_entropy(linear(hidden, weight, shift), targets, reduction="none")
    torch.testing.assert_close(candidate, reference, rtol=1e-12, atol=1e-12)
    each = torch.linspace(-1, 2, count, dtype=torch.float64)
    (our_grad,) = torch.autograd.grad(candidate @ each, hidden)
    (their_grad,) = torch.autograd.grad(reference @ each, hidden)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    hidden, weight, shift, targets = problem(5, dtype=torch.float64, bias=bias, vocab=7, hidden=3)
    assert torch.autograd.gradcheck(
        lambda h: target_nll(h, weight=weight, bias=shift, targets=targets), (hidden,)
    )


def test_a_row_does_not_depend_on_its_chunk(monkeypatch):
    hidden, weight, shift, targets = problem(50, dtype=torch.float64, bias=True)
    whole = target_nll(hidden, weight=weight, bias=shift, targets=targets)
    monkeypatch.setattr("loracle.model.layers.head.CHUNK_ROWS", 7)
    torch.testing.assert_close(
        target_nll(hidden, weight=weight, bias=shift, targets=targets), whole, rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_of_16_bit_states_is_in_fp32(dtype):
    hidden, weight, _, targets = problem(30, dtype=dtype, bias=False)
    nll = target_nll(hidden, weight=weight, bias=None, targets=targets)
    reference = cross_entropy(linear(hidden, weight).float(), targets, reduction="none")
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, reference, rtol=1e-6, atol=1e-6)
    nll.sum().backward()
    assert hidden.grad.dtype == dtype


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1e4, -1e4]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    nll = target_nll(hidden.expand(3, 2), weight=weight, bias=None, targets=torch.arange(3))
    # The logits are near 1e4, whose neighbour in fp32 is 1e-3 away.
    torch.testing.assert_close(nll, torch.tensor([0.693, 20000.693, 0.693]), rtol=0, atol=3e-3)


def test_without_gradients_no_gradient_is_formed():
    hidden, weight, _, targets = problem(3, dtype=torch.float32, bias=False)
    with torch.no_grad():
        assert target_nll(hidden, weight=weight, bias=None, targets=targets).grad_fn is None
