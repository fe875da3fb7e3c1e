"""Packed attention is causal attention within each sequence and nothing across."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loracle.errors import ModelError
from loracle.model.layers.attention import (
    PACKED,
    _attend_by_sequence,
    packed_attention,
    register_packed_attention,
    without_cudnn_attention,
)
from loracle.model.layers.cpu_attention import attend_on_cpu
from loracle.model.layers.varlen_attention import (
    attend_variable_length,
    attends_variable_length,
)
from tiny_engine import tiny_base

LENGTHS = (5, 1, 8)


class Attention(nn.Module):
    """Stands in for a model's attention module, which the function is called with."""

    config = SimpleNamespace()


def drawn(heads: int, *, tokens: int = sum(LENGTHS), size: int = 8) -> torch.Tensor:
    return torch.randn(1, heads, tokens, size, dtype=torch.float64)


def by_hand(query, key, value, *, scaling):
    """softmax(q k^T) v with a block-diagonal causal mask over the whole row."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    block = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    allowed = (block[:, None] == block[None, :]).tril()
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_the_block_diagonal_causal_softmax(kv_heads):
    torch.manual_seed(0)
    query, key, value = drawn(4), drawn(kv_heads), drawn(kv_heads)
    out, weights = packed_attention(
        Attention(), query, key, value, None, lengths=LENGTHS, scaling=0.3
    )
    assert weights is None
    torch.testing.assert_close(out, by_hand(query, key, value, scaling=0.3))


def test_without_a_scale_it_is_one_over_the_root_of_the_head_size():
    torch.manual_seed(1)
    query, key, value = drawn(2), drawn(2), drawn(2)
    out, _ = packed_attention(Attention(), query, key, value, None, lengths=LENGTHS)
    torch.testing.assert_close(out, by_hand(query, key, value, scaling=8**-0.5))


def test_no_gradient_crosses_from_one_sequence_to_another():
    torch.manual_seed(2)
    query, key, value = (drawn(2).requires_grad_() for _ in range(3))
    out, _ = packed_attention(Attention(), query, key, value, None, lengths=LENGTHS)
    out[:, 6:].sum().backward()
    for tensor in (query, key, value):
        assert not tensor.grad[:, :, :6].any()
    assert value.grad[:, :, 6:].any()


def test_a_window_as_long_as_the_longest_sequence_changes_nothing():
    torch.manual_seed(3)
    query, key, value = drawn(2), drawn(2), drawn(2)
    free, _ = packed_attention(Attention(), query, key, value, None, lengths=LENGTHS)
    kept, _ = packed_attention(
        Attention(), query, key, value, None, lengths=LENGTHS, sliding_window=8
    )
    assert torch.equal(free, kept)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"dropout": 0.1}, "not supported"),
        ({"softcap": 50.0}, "not supported"),
        ({"s_aux": torch.zeros(2)}, "not supported"),
        ({"sliding_window": 7}, "sequences of 8 tokens exceed the model's window of 7; set "),
        ({"lengths": None}, "does not receive the lengths of packed sequences"),
    ],
)
def test_what_a_packed_row_does_not_do_is_refused(requested, message):
    query, key, value = drawn(2), drawn(2), drawn(2)
    with pytest.raises(ModelError, match=f"^Attention: .*{message}"):
        packed_attention(Attention(), query, key, value, None, **{"lengths": LENGTHS, **requested})


def test_a_chunked_model_is_held_to_its_chunk():
    module = Attention()
    module.config = SimpleNamespace(attention_chunk_size=4)
    with pytest.raises(ModelError, match="window of 4"):
        packed_attention(module, drawn(2), drawn(2), drawn(2), None, lengths=LENGTHS)


def test_registering_makes_it_known_to_transformers():
    from transformers import AttentionInterface

    register_packed_attention()
    assert AttentionInterface()[PACKED] is packed_attention


def drawn_bf16(*, kv_heads: int, lengths=(37, 1, 64, 20), size=16, spread=2.0):
    draw = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    shapes = [(1, heads, tokens, size) for heads in (6, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=draw) * spread for shape in shapes)
    grad = torch.randn(1, tokens, 6, size, generator=draw)
    return lengths, [tensor.bfloat16() for tensor in (query, key, value, grad)]


def outcome(attend, tensors, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("scale", [0.25, 0.3])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_the_cpu_path_is_as_near_to_exact_as_pytorchs_own(kv_heads, scale):
    lengths, (*tensors, grad) = drawn_bf16(kv_heads=kv_heads)

    def stock(*leaves):
        return _attend_by_sequence(*leaves, lengths=lengths, scale=scale)

    def own(*leaves):
        return attend_on_cpu(*leaves, lengths=lengths, scale=scale)

    exact = outcome(stock, [tensor.double() for tensor in tensors], grad.double())
    candidate, reference = outcome(own, tensors, grad), outcome(stock, tensors, grad)
    assert torch.equal(candidate[0], reference[0])
    for mine, other, expected in zip(candidate, reference, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        # measured: up to 1.6 times PyTorch's own rounding error
        assert error(mine, expected) < max(2.5 * error(other, expected), 0.004)


def test_a_long_sequence_of_large_scores_stays_finite_and_right():
    """Scores above the diagonal may be huge: they are thrown away, not multiplied by zero."""
    lengths, (*tensors, grad) = drawn_bf16(kv_heads=2, lengths=(500,), spread=8.0)
    exact = outcome(
        lambda *leaves: _attend_by_sequence(*leaves, lengths=lengths, scale=0.25),
        [tensor.double() for tensor in tensors],
        grad.double(),
    )
    candidate = outcome(
        lambda *leaves: attend_on_cpu(*leaves, lengths=lengths, scale=0.25), tensors, grad
    )
    for mine, expected in zip(candidate, exact, strict=True):
        assert error(mine, expected) < 0.03


def varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What the GPU kernel promises, one sequence after another."""
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == cu_q.diff().max()
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    lengths = tuple(cu_q.diff().tolist())
    rows = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    return _attend_by_sequence(*rows, lengths=lengths, scale=scale)[0]


def varlen_of_older_releases(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None):
    assert is_causal
    assert k.shape == q.shape
    rows = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    return _attend_by_sequence(*rows, lengths=tuple(cu_q.diff().tolist()), scale=scale)[0]


@pytest.mark.parametrize("kernel", [varlen_reference, varlen_of_older_releases])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_variable_length_kernel_is_called_as_it_asks(kernel, kv_heads):
    torch.manual_seed(4)
    query, key, value = drawn(4), drawn(kv_heads), drawn(kv_heads)
    ends = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    out = attend_variable_length(
        query, key, value, lengths=LENGTHS, ends=ends, scale=0.3, kernel=kernel
    )
    torch.testing.assert_close(out, by_hand(query, key, value, scaling=0.3))


def test_without_cudnn_attention_what_was_set_comes_back():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_answers_and_stock_passes_do_without_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with tiny_base().generating(()):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "has"),
    [
        ("cpu", torch.bfloat16, (9, 0), False),
        ("cuda", torch.float32, (9, 0), False),
        ("cuda", torch.float16, (7, 5), False),
        ("cuda", torch.bfloat16, (8, 0), True),
    ],
)
def test_the_kernel_is_used_where_it_exists(monkeypatch, device, dtype, capability, has):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attends_variable_length(torch.device(device), dtype) is has
