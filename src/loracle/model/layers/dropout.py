"""LoRA dropout whose mask is a function of run seed, step, module and slot.

The slot is the place of a sequence in its run's batch. So a mask does not depend on micro-batches,
on other sequences in the row or on the device; it is recomputed in the backward pass instead of
being stored, and resuming needs no saved state.

Words come from a counter, not from a generator: word j of token t is SplitMix64's mixing function
of key(t) + key(module) + j * gamma. This is integer arithmetic, so it runs on all cores and gives
the same bits everywhere. A 64-bit word serves four features. With ``threshold = round(p * 32768)``,
an element is dropped when the 15 low bits of its 16-bit lane are at least ``32768 - threshold``. So
``threshold / 32768`` is the realised probability (0.1 becomes 0.100006), from which the scale is
computed, and the expectation is exact.

This is the arithmetic in plain PyTorch, which runs everywhere; ``masked`` does it in one pass. A
mask is held as 16-bit lanes of all ones (kept) or all zeros (dropped) and applied by AND-ing it to
the bits of the numbers: measured ten times as fast as ``torch.where`` (LOG.md).

Source: Steele, Lea, Flood 2014 "Fast splittable pseudorandom number generators", and its mixing
function as in Vigna's public-domain splitmix64.c.
Shapes: T tokens of a run in the row, I input features, W = ceil(I / 4) words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

from loracle.data.packing import to_device
from loracle.model.layers.kept import kept
from loracle.seeds import stream_seed

_LEVELS = 1 << 15
_LANES = 4
_SIGN = -(1 << 15)


def _signed(word: int) -> int:
    """Returns the signed 64-bit integer with the same bits, as torch uses it."""
    return word - (1 << 64) if word >= 1 << 63 else word


# source: splitmix64.c; the golden gamma and the two multipliers of variant 13 of Stafford's mixers
_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


@dataclass(frozen=True)
class DropoutStream:
    """Identifies the masks of one run in one packed row."""

    threshold: int
    """How many of the 32768 values of a 15-bit word are dropped: the highest."""
    seed: int
    """The run's seed."""
    step: int
    """Optimizer step, from 0."""
    slots: tuple[int, ...]
    """Place of each sequence in the run's batch."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""

    @classmethod
    def keeping(cls, tokens: int) -> DropoutStream:
        """Returns a stream that drops nothing, for tokens without dropout."""
        return cls(threshold=0, seed=0, step=0, slots=(0,), lengths=(tokens,))

    @property
    def scale(self) -> float:
        """1 / (1 - p) for the realised probability p."""
        return _LEVELS / (_LEVELS - self.threshold)


def threshold_of(probability: float) -> int:
    """Returns the 15-bit threshold nearest to a dropout probability."""
    return min(round(probability * _LEVELS), _LEVELS - 1)


def keep_bits(
    streams: tuple[DropoutStream, ...], *, module: str, features: int, device: torch.device
) -> Int16[Tensor, "T {features}"]:
    """Returns -1 (all ones) where an element of a module's input is kept, 0 where it is dropped.

    The tokens of several runs are consecutive and take as many kernels as those of one run.
    """
    threshold: Any
    keys = token_keys(streams, device)
    if len(streams) == 1:
        threshold = streams[0].threshold
    else:
        threshold = token_thresholds(streams, device)[:, None]
    counters = _counters((features + _LANES - 1) // _LANES, keys.device)
    lanes = _mixed((keys + module_key(module))[:, None] + counters).view(torch.int16)
    # Setting the lane's top bit makes it negative; adding the threshold makes exactly the dropped
    # ones non-negative; the arithmetic shift copies the sign over the lane.
    lanes.bitwise_or_(_SIGN).add_(threshold).bitwise_right_shift_(15)
    return lanes[:, :features]


def zero_dropped(x: Float[Tensor, "T I"], bits: Int16[Tensor, "T I"]) -> Float[Tensor, "T I"]:
    """Returns ``x`` with zeros where it is dropped; the kept numbers keep their bits."""
    whole = _WHOLE[x.element_size()]
    return (x.view(whole) & bits.to(whole)).view(x.dtype)


def zero_dropped_(x: Float[Tensor, "T I"], bits: Int16[Tensor, "T I"]) -> Float[Tensor, "T I"]:
    """Zeroes the dropped elements of ``x`` in place and returns it."""
    whole = _WHOLE[x.element_size()]
    x.view(whole).bitwise_and_(bits.to(whole))
    return x


_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# Enough for the runs of a bundle; every module of a pass, and its gradient, uses the same ones.
@kept(most=64)
def _token_keys(stream: DropoutStream, device: torch.device) -> Int64[Tensor, " T"]:
    """Returns a key per token: the mixed counter of its place in its sequence."""
    keys = [
        torch.arange(length) * _GAMMA + stream_seed(stream.seed, "dropout", stream.step, slot)
        for slot, length in zip(stream.slots, stream.lengths, strict=True)
    ]
    return to_device(_mixed(torch.cat(keys)), device=device)


def token_keys(streams: tuple[DropoutStream, ...], device: torch.device) -> Int64[Tensor, " T"]:
    """Returns a key per token of all streams; with ``module_key`` added, that of its counter."""
    return _token_keys(streams[0], device) if len(streams) == 1 else _stacked_keys(streams, device)


@kept(most=4)
def _stacked_keys(streams: tuple[DropoutStream, ...], device: torch.device) -> Int64[Tensor, " T"]:
    return torch.cat([_token_keys(stream, device) for stream in streams])


@kept(most=4)
def token_thresholds(
    streams: tuple[DropoutStream, ...], device: torch.device
) -> Int16[Tensor, " T"]:
    """Returns the threshold of every token of all streams."""
    parts = [torch.full((sum(s.lengths),), s.threshold, dtype=torch.int16) for s in streams]
    return to_device(torch.cat(parts), device=device)


@lru_cache(maxsize=4096)
def module_key(module: str) -> int:
    """Returns what a module adds to the keys of tokens."""
    return stream_seed(0, "dropout module", module)


@kept(most=64)
def _counters(words: int, device: torch.device) -> Int64[Tensor, " W"]:
    return torch.arange(words, device=device) * _GAMMA


def _mixed(z: Int64[Tensor, ...]) -> Int64[Tensor, ...]:
    """Mixes the words of ``z`` in place, as splitmix64 does, and returns it."""
    shifted = torch.empty_like(z)
    _xor_shifted(z, 30, shifted).mul_(_FIRST)
    _xor_shifted(z, 27, shifted).mul_(_SECOND)
    return _xor_shifted(z, 31, shifted)


def _xor_shifted(z: Tensor, bits: int, shifted: Tensor) -> Tensor:
    """Computes z ^= z >> bits with a logical shift; torch's own is arithmetic."""
    torch.bitwise_right_shift(z, bits, out=shifted)
    return z.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits)) - 1))
