"""Triton kernels of what lies between the products of a decoder layer, one launch each.

Each computes in fp32 and rounds to the tensors' dtype where stock Transformers rounds, so that it
gives the stock numbers up to the last bits of fp32. Nothing is accumulated across programs, so the
same input always gives the same bits.

Imported only where Triton is installed: it comes with CUDA builds of PyTorch.

Shapes: T tokens, H features, B sequences, D head size.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call, unused-ignore, misc"

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024
# A fused multiply-add would round once where stock code rounds twice.
_AS_STOCK = {"enable_fp_fusion": False}


@triton.jit
def norm_rows(x, weight, y, inverse, epsilon, features, BLOCK: tl.constexpr):
    """Writes a row of ``w * x / rms(x)``, and ``1 / rms(x)``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    given = tl.load(x + row * features + columns, mask=inside, other=0.0)
    wide = given.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / features + epsilon)
    tl.store(inverse + row, scale)
    normed = (wide * scale).to(given.dtype).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * features + columns, (normed * weights).to(given.dtype), mask=inside)


@triton.jit
def norm_rows_backward(grad, x, weight, inverse, grad_x, features, BLOCK: tl.constexpr):
    """Writes a row of the gradient of ``x``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    given = tl.load(x + row * features + columns, mask=inside, other=0.0)
    arrived = tl.load(grad + row * features + columns, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inverse + row)
    direction = given.to(tl.float32) * scale
    inner = (arrived * weights).to(given.dtype).to(tl.float32)
    along = tl.sum(inner * direction, axis=0) / features
    result = (inner - direction * along) * scale
    tl.store(grad_x + row * features + columns, result.to(given.dtype), mask=inside)


@triton.jit
def gate_elements(gate, up, out, count, BLOCK: tl.constexpr):
    """Writes ``silu(gate) * up``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    given = tl.load(gate + place, mask=inside, other=0.0)
    wide = given.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(given.dtype).to(tl.float32)
    passed = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (opened * passed).to(given.dtype), mask=inside)


@triton.jit
def gate_elements_backward(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    """Writes the gradients of ``gate`` and ``up``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    given = tl.load(gate + place, mask=inside, other=0.0)
    wide = given.to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-wide))
    arrived = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(given.dtype).to(tl.float32)
    tl.store(grad_up + place, (arrived * opened).to(given.dtype), mask=inside)
    passed = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    inner = (arrived * passed).to(given.dtype).to(tl.float32)
    slope = share * (1.0 + wide * (1.0 - share))
    tl.store(grad_gate + place, (inner * slope).to(given.dtype), mask=inside)


@triton.jit
def _rotate_heads(
    source,
    target,
    heads,
    stride,
    half,
    c1,
    c2,
    sa,
    sb,
    sign,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotates all heads of one token; ``stride`` is from head to head of ``source``."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (row < heads) & (column < half)
    given = tl.load(source + row * stride + column, mask=inside, other=0.0)
    dtype = given.dtype
    low = given.to(tl.float32)
    high = tl.load(source + row * stride + half + column, mask=inside, other=0.0).to(tl.float32)
    first = (low * c1).to(dtype).to(tl.float32) + sign * (high * sa).to(dtype).to(tl.float32)
    second = (high * c2).to(dtype).to(tl.float32) - sign * (low * sb).to(dtype).to(tl.float32)
    place = target + row * (2 * half) + column
    tl.store(place, first.to(dtype), mask=inside)
    tl.store(place + half, second.to(dtype), mask=inside)


@triton.jit
def rotate_tokens(
    q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, half,
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, sin_batch,
    BACK: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Writes a token's rotated queries and keys, head after head; backwards if ``BACK``."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    column = tl.arange(0, HALF)[None, :]
    inside = column < half
    cos += batch * cos_batch + token * (2 * half) + column
    sin += batch * sin_batch + token * (2 * half) + column
    c1 = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sa, sb, sign = s2, s1, 1.0
    else:
        sa, sb, sign = s1, s2, -1.0
    _rotate_heads(
        q + batch * q_batch + token * q_token, q_out + program * q_heads * (2 * half),
        q_heads, q_head, half, c1, c2, sa, sb, sign, Q_ROWS, HALF,
    )  # fmt: skip
    _rotate_heads(
        k + batch * k_batch + token * k_token, k_out + program * k_heads * (2 * half),
        k_heads, k_head, half, c1, c2, sa, sb, sign, K_ROWS, HALF,
    )  # fmt: skip


@triton.jit
def part_elements(
    x, out, count, columns, slots, raised, lifted, falls,
    TERMS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the parts of one number to each of its slots; ``slots`` has two bits for each."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    row, column = place // columns, place % columns
    rest = tl.load(x + row * TERMS * columns + column, mask=inside, other=0.0) * lifted
    for term in tl.static_range(1, TERMS):
        more = tl.load(x + (row * TERMS + term) * columns + column, mask=inside, other=0.0)
        rest += more * (falls * lifted)
    dtype = out.dtype.element_ty
    first = rest.to(dtype)
    rest -= first.to(tl.float32)
    second = (rest * raised).to(dtype)
    rest -= second.to(tl.float32) / raised
    third = (rest * raised).to(dtype)
    reduced = (first.to(tl.float32) / raised).to(dtype)
    for slot in tl.static_range(SLOTS):
        part = (slots >> (2 * slot)) & 3
        value = tl.where(
            part == 0, first if slot == 0 else reduced, tl.where(part == 1, second, third)
        )
        tl.store(out + (row * SLOTS + slot) * columns + column, value, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, out: Tensor, inverse: Tensor) -> None:
    """Normalises the contiguous rows of ``x`` (*, H)."""
    block = triton.next_power_of_2(x.shape[-1])
    with _device_of(x):
        norm_rows[(inverse.numel(),)](
            x, weight, out, inverse, epsilon, x.shape[-1], BLOCK=block, **_row_options(block)
        )


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, out: Tensor
) -> None:
    """Writes the gradient of the contiguous rows of ``x`` (*, H)."""
    block = triton.next_power_of_2(x.shape[-1])
    with _device_of(x):
        norm_rows_backward[(inverse.numel(),)](
            grad, x, weight, inverse, out, x.shape[-1], BLOCK=block, **_row_options(block)
        )


def silu_gate(gate: Tensor, up: Tensor, *, out: Tensor) -> None:
    """Writes ``silu(gate) * up`` of contiguous tensors."""
    count = gate.numel()
    with _device_of(gate):
        gate_elements[(triton.cdiv(count, _ELEMENTS),)](
            gate, up, out, count, BLOCK=_ELEMENTS, **_AS_STOCK
        )


def silu_gate_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, outs: tuple[Tensor, Tensor]
) -> None:
    """Writes the gradients of ``gate`` and ``up``, all of them contiguous."""
    count = gate.numel()
    with _device_of(gate):
        gate_elements_backward[(triton.cdiv(count, _ELEMENTS),)](
            grad, gate, up, *outs, count, BLOCK=_ELEMENTS, **_AS_STOCK
        )


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool, outs: tuple[Tensor, Tensor]
) -> None:
    """Rotates queries and keys (B, heads, T, D), whose last stride is 1; ``outs`` lie (B, T, ...).

    ``cos`` and ``sin`` are contiguous, (1 or B, T, D).
    """
    (batch, q_heads, tokens, size), k_heads = q.shape, k.shape[1]
    with _device_of(q):
        rotate_tokens[(batch * tokens,)](
            q, k, cos, sin, *outs, tokens, q_heads, k_heads, size // 2,
            *(x.stride(i) for x in (q, k) for i in range(3)),
            *(0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin)),
            BACK=back, Q_ROWS=triton.next_power_of_2(q_heads),
            K_ROWS=triton.next_power_of_2(k_heads), HALF=triton.next_power_of_2(size // 2),
            **_AS_STOCK,
        )  # fmt: skip


def parts(
    x: Tensor,
    *,
    slots: Sequence[int],
    raised: float,
    lifted: float,
    terms: int,
    falls: float,
    out: Tensor,
) -> None:
    """Writes parts of the sums of ``terms`` slices of each contiguous row to its ``slots``."""
    columns = x.shape[1] // terms
    count = len(x) * columns
    packed = sum(part << (2 * slot) for slot, part in enumerate(slots))
    with _device_of(x):
        part_elements[(triton.cdiv(count, _ELEMENTS),)](
            x, out, count, columns, packed, raised, lifted, falls,
            TERMS=terms, SLOTS=len(slots), BLOCK=_ELEMENTS, **_AS_STOCK,
        )  # fmt: skip


def _row_options(block: int) -> dict[str, object]:
    # assumed: sixteen numbers a thread
    return {"num_warps": min(max(block // 512, 1), 16), **_AS_STOCK}


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes a kernel start on the tensor's GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
