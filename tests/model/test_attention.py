"""Packed attention is causal attention within each sequence and nothing across."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loracle.errors import ModelError
from loracle.model.attention import PACKED, packed_attention, register_packed_attention

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
    ("asked", "message"),
    [
        ({"dropout": 0.1}, "not supported"),
        ({"softcap": 50.0}, "not supported"),
        ({"s_aux": torch.zeros(2)}, "not supported"),
        ({"sliding_window": 7}, "sequences of 8 tokens exceed the model's window of 7; set "),
        ({"lengths": None}, "is not told where the sequences of a packed row end"),
    ],
)
def test_what_a_packed_row_does_not_do_is_refused(asked, message):
    query, key, value = drawn(2), drawn(2), drawn(2)
    with pytest.raises(ModelError, match=f"^Attention: .*{message}"):
        packed_attention(Attention(), query, key, value, None, **{"lengths": LENGTHS, **asked})


def test_a_chunked_model_is_held_to_its_chunk():
    module = Attention()
    module.config = SimpleNamespace(attention_chunk_size=4)
    with pytest.raises(ModelError, match="window of 4"):
        packed_attention(module, drawn(2), drawn(2), drawn(2), None, lengths=LENGTHS)


def test_registering_makes_it_known_to_transformers():
    from transformers import AttentionInterface

    register_packed_attention()
    assert AttentionInterface()[PACKED] is packed_attention
