"""An adapter's product by 16-bit parts is as exact as PEFT's in fp32."""

import pytest
import torch

from loracle.model.layers import adapter_precision
from loracle.model.layers.adapter_precision import (
    add_update,
    add_update_in_parts,
    multiplies_exactly,
    parts,
)

HALVES = (torch.bfloat16, torch.float16)


def operands(dtype=torch.bfloat16, *, tokens=64, features=300, width=40, rank=8, spread_b=0.1):
    torch.manual_seed(0)
    x, out = torch.randn(tokens, features).to(dtype), torch.randn(tokens, width).to(dtype)
    return out, x, torch.randn(rank, features) * 0.1, torch.randn(width, rank) * spread_b


def test_three_parts_add_up_to_the_number():
    numbers, like = torch.randn(5, 12), torch.empty(0, dtype=torch.bfloat16)
    found = parts(numbers, like=like, slots=(0, 1, 2), raised=1.0).float().view(5, 3, 12)
    torch.testing.assert_close(found.sum(dim=1), numbers, rtol=2**-23, atol=0)
    assert torch.equal(found[:, 0], numbers.bfloat16().float())


def test_two_parts_in_fp16_do_with_the_smaller_one_enlarged():
    numbers, like = torch.randn(5, 12) * 1e-3, torch.empty(0, dtype=torch.float16)
    found = parts(numbers, like=like, slots=(0, 1), raised=2.0**11).float().view(5, 2, 12)
    torch.testing.assert_close(found[:, 0] + found[:, 1] / 2**11, numbers, rtol=0, atol=2**-31)


def test_slices_are_added_up_first():
    numbers, like = torch.randn(4, 6), torch.empty(0, dtype=torch.bfloat16)
    added = numbers[:, :3] + numbers[:, 3:] * 0.5
    expected = parts(added, like=like, slots=(1, 0), raised=1.0)
    found = parts(numbers, like=like, slots=(1, 0), raised=1.0, terms=2, falls=0.5)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spread_b", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_update_is_that_of_fp32(dtype, spread_b):
    """The output begins at minus the rounded result, so that nothing hides the error."""
    out, x, a, b = operands(dtype, spread_b=spread_b)
    exact = 2.0 * (x.double() @ a.double().T @ b.double().T)
    out = (-exact).to(dtype)
    left = exact + out.double()
    add_update_in_parts(out, x, a, b, scale=2.0)
    # An output of 1e-5 has few bits of its own in fp16.
    within = 5e-6 if dtype == torch.bfloat16 or spread_b > 1e-4 else 1e-3
    assert (out.double() - left).norm() <= within * exact.norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_the_test_of_a_device_holds_where_sums_are_in_fp32(dtype):
    assert multiplies_exactly(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_hardly_an_output_rounds_otherwise_than_pefts(dtype):
    out, x, a, b = operands(dtype)
    peft = out.clone()
    peft += (x.float() @ a.T @ b.T).mul_(2.0)
    add_update_in_parts(out, x, a, b, scale=2.0)
    assert (out != peft).float().mean() <= 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_multiplies_as_peft_does(dtype, monkeypatch):
    monkeypatch.setattr(adapter_precision, "add_update_in_parts", None)
    out, x, a, b = (tensor.to(dtype) for tensor in operands())
    a, b = a.float(), b.float()
    expected = out.clone()
    expected += (x.float() @ a.T @ b.T).mul_(0.5)
    add_update(out, x, a, b, scale=0.5)
    assert torch.equal(out, expected)
