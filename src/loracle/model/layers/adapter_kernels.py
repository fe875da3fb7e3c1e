"""Dropout and the narrow products of adapters on a CUDA device, each in one kernel.

Imported where a kernel is launched, because Triton comes with PyTorch's CUDA builds only. A mask is
drawn again wherever it is applied, in registers, and never written. Factors are read as they are
stored, in fp32, and rounded to the activations' dtype in the kernel; sums are in fp32. Products are
ordered alike in every launch, so that the same input gives the same bits.

Shapes: T tokens, K input features, N features of an update, R rank (B* is a tile of each).
Source: Triton, Tillet et al. 2019, https://doi.org/10.1145/3315508.3329973; a 64-bit word serves
four features, so a tile of words is made and its four lanes are interleaved.
"""

# ruff: noqa: N803 - sizes are named as in the legend, what the compiler knows in capitals
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call, unused-ignore, misc, no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# source: splitmix64.c, as in `dropout`; written as signed numbers
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_SECOND = tl.constexpr(0x94D049BB133111EB - (1 << 64))
_LEVELS = tl.constexpr(1 << 15)

# assumed: enough programs to fill a device, tiles small enough for the shared memory of a T4
_WAVES = 2
_DROP_TILE = (16, 256)


@dataclass(frozen=True)
class Drawn:
    """What a mask over (T, features) is drawn from."""

    keys: Tensor
    """int64, one per token."""
    thresholds: Tensor
    """int16, one per token."""
    module: int
    """Added to the keys."""


@triton.jit
def _mixed(z):
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _kept(keys, thresholds, module, t, live, first, WIDTH: tl.constexpr):
    """Returns (tokens, WIDTH) booleans of the features from ``first``, a multiple of 4."""
    key = tl.load(keys + t, mask=live, other=0) + module
    limit = _LEVELS - tl.load(thresholds + t, mask=live, other=0).to(tl.int32)
    word = (first // 4 + tl.arange(0, WIDTH // 4)).to(tl.int64)
    words = _mixed(key[:, None] + word[None, :] * _GAMMA)
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    even = tl.interleave(low & 0x7FFF, high & 0x7FFF)
    odd = tl.interleave((low >> 16) & 0x7FFF, (high >> 16) & 0x7FFF)
    return tl.interleave(even, odd) < limit[:, None]


@triton.jit(do_not_specialize=["T", "module"])
def _drop(
    x, out, keys, thresholds, module, T, K, x_stride, out_stride,
    ADDS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    inside = (t < T)[:, None] & (k < K)[None, :]
    tile = tl.load(x + t[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
    kept = _kept(keys, thresholds, module, t, t < T, first, BK)
    tile = tl.where(kept, tile, 0.0).to(tile.dtype)
    to = out + t[:, None] * out_stride + k[None, :]
    if ADDS:
        before = tl.load(to, mask=inside, other=0.0)
        tile = (before.to(tl.float32) + tile.to(tl.float32)).to(tile.dtype)
    tl.store(to, tile, mask=inside)


@triton.jit(do_not_specialize=["T", "module"])
def _narrow(
    x, factor, out, keys, thresholds, module, scale, bounds, T, K, R,
    x_stride, r_stride, k_stride,
    MASKED: tl.constexpr, SCALED: tl.constexpr, BOUNDED: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r, live = tl.arange(0, BR), t < T
    total = tl.zeros((BT, BR), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        inside = live[:, None] & (k < K)[None, :]
        tile = tl.load(x + t[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
        if MASKED:
            kept = _kept(keys, thresholds, module, t, live, first, BK)
            tile = tl.where(kept, tile, 0.0).to(tile.dtype)
        there = (k < K)[:, None] & (r < R)[None, :]
        at = factor + k.to(tl.int64)[:, None] * k_stride + r[None, :] * r_stride
        other = tl.load(at, mask=there, other=0.0).to(tile.dtype)
        total = tl.dot(tile, other, total, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + r, mask=r < R, other=0.0)[None, :]
    if BOUNDED:
        low = tl.load(bounds + 2 * t, mask=live, other=0)
        high = tl.load(bounds + 2 * t + 1, mask=live, other=0)
        own = (r[None, :] >= low[:, None]) & (r[None, :] < high[:, None])
        total = tl.where(own, total, 0.0)
    to = out + t[:, None] * R + r[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=live[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["T", "module"])
def _widen(
    out, z, factor, keys, thresholds, module, scale, T, N, R,
    out_stride, r_stride, n_stride,
    MASKED: tl.constexpr, SCALED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BN
    n, r, live = first + tl.arange(0, BN), tl.arange(0, BR), t < T
    there = live[:, None] & (r < R)[None, :]
    tile = tl.load(z + t[:, None] * R + r[None, :], mask=there, other=0.0)
    at = factor + r[:, None] * r_stride + n.to(tl.int64)[None, :] * n_stride
    other = tl.load(at, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
    if SCALED:
        other *= tl.load(scale + r, mask=r < R, other=0.0)[:, None]
    update = tl.dot(tile, other.to(tile.dtype), input_precision="ieee")
    if MASKED:
        kept = _kept(keys, thresholds, module, t, live, first, BN)
        update = tl.where(kept, update, 0.0)
    to = out + t[:, None] * out_stride + n[None, :]
    inside = live[:, None] & (n < N)[None, :]
    before = tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, (before + update).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "module"])
def _outer(
    z, y, out, keys, thresholds, module, scale, T, N, R, each,
    y_stride, part_stride, r_stride, n_stride,
    MASKED: tl.constexpr, SCALED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    n, r = first + tl.arange(0, BN), tl.arange(0, BR)
    start = tl.program_id(1) * each
    total = tl.zeros((BR, BN), tl.float32)
    for begin in range(start, tl.minimum(start + each, T), BT):
        t = (begin + tl.arange(0, BT)).to(tl.int64)
        live = t < T
        there = live[:, None] & (r < R)[None, :]
        left = tl.load(z + t[:, None] * R + r[None, :], mask=there, other=0.0)
        inside = live[:, None] & (n < N)[None, :]
        tile = tl.load(y + t[:, None] * y_stride + n[None, :], mask=inside, other=0.0)
        if MASKED:
            kept = _kept(keys, thresholds, module, t, live, first, BN)
            tile = tl.where(kept, tile, 0.0).to(tile.dtype)
        total = tl.dot(tl.trans(left), tile, total, input_precision="ieee")
    if SCALED:
        total *= tl.load(scale + r, mask=r < R, other=0.0)[:, None]
    at = out + tl.program_id(1) * part_stride
    at += r[:, None] * r_stride + n.to(tl.int64)[None, :] * n_stride
    tl.store(at, total, mask=(r < R)[:, None] & (n < N)[None, :])


def drop(x: Tensor, mask: Drawn, *, out: Tensor, adds: bool) -> None:
    """Writes ``x``, (T, K), with zeros where it is dropped to ``out``, or adds it."""
    rows, features = x.shape
    tokens, width = _DROP_TILE
    _drop[(triton.cdiv(rows, tokens), triton.cdiv(features, width))](
        x, out, *_drawn(mask), rows, features, x.stride(0), out.stride(0),
        ADDS=adds, BT=tokens, BK=width,
    )  # fmt: skip


def narrow(
    x: Tensor, factor: Tensor, mask: Drawn | None, *, scale: Tensor | None, bounds: Tensor | None
) -> Tensor:
    """Returns ``drop(x) factor^T``, (T, R), its columns scaled and those of other runs zero."""
    (rows, features), rank = x.shape, len(factor)
    out = x.new_empty(rows, rank)
    tokens = next(
        (size for size in (64, 32) if 4 * triton.cdiv(rows, size) >= 3 * _multiprocessors(x)), 16
    )
    padded = padded_rank(rank)
    width = {16: 128, 32: 64, 64: 64}.get(padded, 32)
    _narrow[(triton.cdiv(rows, tokens),)](
        x, factor, out, *_drawn(mask), scale, bounds, rows, features, rank,
        x.stride(0), factor.stride(0), factor.stride(1),
        MASKED=mask is not None, SCALED=scale is not None, BOUNDED=bounds is not None,
        BT=tokens, BK=width, BR=padded, num_warps=_warps(padded), num_stages=2,
    )  # fmt: skip
    return out


def widen(
    out: Tensor, z: Tensor, factor: Tensor, mask: Drawn | None, *, scale: Tensor | None
) -> None:
    """Adds ``drop(z (scale factor))`` to ``out``, (T, N), for ``factor`` of (R, N)."""
    (rows, features), rank = out.shape, len(factor)
    padded = padded_rank(rank)
    tokens, width = 64, 64 if padded > 64 else 128
    _widen[(triton.cdiv(rows, tokens), triton.cdiv(features, width))](
        out, z, factor, *_drawn(mask), scale, rows, features, rank,
        out.stride(0), factor.stride(0), factor.stride(1),
        MASKED=mask is not None, SCALED=scale is not None,
        BT=tokens, BN=width, BR=padded, num_warps=_warps(padded), num_stages=1,
    )  # fmt: skip


def outer(
    z: Tensor, y: Tensor, mask: Drawn | None, *, scale: Tensor | None, by_feature: bool
) -> Tensor:
    """Returns ``scale z^T drop(y)`` in fp32: (R, N), or (N, R) if ``by_feature``.

    The tokens are divided between programs, whose sums are added up in their order.
    """
    (rows, features), rank = y.shape, z.shape[1]
    padded = padded_rank(rank)
    tokens, width = 32 if padded > 64 else 64, 64
    tiles = triton.cdiv(features, width)
    parts = num_parts(rows, rank, tiles=tiles, wanted=_WAVES * _multiprocessors(y))
    each = triton.cdiv(triton.cdiv(rows, parts), tokens) * tokens
    parts = max(1, triton.cdiv(rows, each))
    shape = (features, rank) if by_feature else (rank, features)
    out = y.new_empty(parts, *shape, dtype=torch.float32)
    part_stride, *strides = out.stride()
    r_stride, n_stride = reversed(strides) if by_feature else strides
    _outer[(tiles, parts)](
        z, y, out, *_drawn(mask), scale, rows, features, rank, each,
        y.stride(0), part_stride, r_stride, n_stride,
        MASKED=mask is not None, SCALED=scale is not None,
        BT=tokens, BN=width, BR=padded, num_warps=_warps(padded), num_stages=2,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(dim=0)


def padded_rank(rank: int) -> int:
    """Returns the power of two, 16 or more, that a tile holds for a rank."""
    return max(16, triton.next_power_of_2(rank))


def num_parts(rows: int, rank: int, *, tiles: int, wanted: int) -> int:
    """Returns into how many the tokens are divided: to fill a device, while sums stay small."""
    return max(1, min(triton.cdiv(wanted, tiles), rows // (16 * rank), rows // 128))


def _drawn(mask: Drawn | None) -> tuple[Tensor | None, Tensor | None, int]:
    return (None, None, 0) if mask is None else (mask.keys, mask.thresholds, mask.module)


def _warps(padded: int) -> int:
    return 8 if padded > 64 else 4


def _multiprocessors(x: Tensor) -> int:
    if not x.is_cuda:  # interpreted
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count
