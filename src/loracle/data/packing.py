"""Sequences laid end to end in one row, so that no padding ever reaches a linear layer.

Shapes: T tokens in the row, N target positions, S sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int32, Int64
from torch import Tensor


@runtime_checkable
class Tokens(Protocol):
    """The attributes of an example that packing reads."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Prompt, response and EOS."""

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt; every later token is a target."""


@dataclass(frozen=True)
class PackedRow:
    """The sequences of one forward pass, end to end."""

    input_ids: Int64[Tensor, "1 T"]
    position_ids: Int64[Tensor, "1 T"]
    """Positions that start again at 0 in each sequence."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, in order; they sum to T."""
    ends: Int32[Tensor, " ends"]
    """0, and one past the last token of each sequence; for attention on a GPU."""
    source: Int64[Tensor, " N"]
    """Positions whose hidden state predicts a target."""
    targets: Int64[Tensor, " N"]
    """Token ids to predict."""
    num_targets: tuple[int, ...]
    """Targets of each sequence, in order; they sum to N."""

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in the row."""
        return sum(self.lengths)


def pack(examples: Sequence[Tokens], *, device: torch.device | str = "cpu") -> PackedRow:
    """Returns the examples end to end, with the positions where targets are predicted.

    A target at position p is predicted from the hidden state at p - 1 of the same sequence. The
    first token of a sequence has nothing before it and is never a target, even without a prompt.
    """
    ids, positions, sources, lengths, counts = [], [], [], [], []
    offset = 0
    for example in examples:
        tokens = torch.as_tensor(example.input_ids, dtype=torch.int64)
        length = len(tokens)
        first = max(example.num_prompt, 1)
        ids.append(tokens)
        positions.append(torch.arange(length))
        sources.append(torch.arange(offset + first - 1, offset + length - 1))
        lengths.append(length)
        counts.append(length - first)
        offset += length
    flat, source = torch.cat(ids), torch.cat(sources)
    return PackedRow(
        input_ids=to_device(flat[None], device=device),
        position_ids=to_device(torch.cat(positions)[None], device=device),
        lengths=tuple(lengths),
        ends=to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device=device),
        source=to_device(source, device=device),
        targets=to_device(flat[source + 1], device=device),
        num_targets=tuple(counts),
    )


def to_device(tensor: Tensor, *, device: torch.device | str) -> Tensor:
    """Returns the tensor on ``device``; copies from pinned memory, which does not synchronise."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def batches_by_tokens(lengths: Sequence[int], *, budget: int) -> list[range]:
    """Returns consecutive index ranges of at most ``budget`` tokens each, as equal as possible.

    The fewest batches that the budget allows, and among those the smallest largest batch, so that
    no small rest is left for the last one. Order is preserved, so results do not depend on the
    budget. A sequence longer than the budget gets its own batch.
    """
    batches = _filled(lengths, budget=budget)
    if len(batches) < 2:
        return batches
    sizes = range(-(-sum(lengths) // len(batches)), budget)
    smallest = bisect_left(
        sizes, True, key=lambda size: len(_filled(lengths, budget=size)) <= len(batches)
    )
    return _filled(lengths, budget=sizes.start + smallest) if smallest < len(sizes) else batches


def _filled(lengths: Sequence[int], *, budget: int) -> list[range]:
    """Returns batches filled greedily."""
    batches: list[range] = []
    start = total = 0
    for index, length in enumerate(lengths):
        if total and total + length > budget:
            batches.append(range(start, index))
            start, total = index, 0
        total += length
    if start < len(lengths):
        batches.append(range(start, len(lengths)))
    return batches
