"""The adapter's product of scores and answers: as exact as PEFT's in fp32, by 16-bit products.

PEFT multiplies by its fp32 factors in fp32, for which a GPU has a sixteenth of its speed in bf16
(source: NVIDIA A100 data sheet) and which reads and writes twice the bytes. A number in fp32 has 24
bits, one in bf16 has 8 and one in fp16 has 11, so three or two of them add up to it, part by part:

    A = A1 + A2 + A3      z = x A1^T + x A2^T + x A3^T          B, z likewise
    out += scale (z1 B1^T + z1 B2^T + z2 B1^T + z1 B3^T + z2 B2^T + z3 B1^T)

Products of two such numbers are exact in fp32, in which a GPU adds them up; ``out`` is rounded
once, as by PEFT. In fp16 small parts are held enlarged by powers of two.
``benchmarks/adapter_precision.py`` measures the errors.

Shapes: T tokens, I input and O output features, r rank.
Source: Henry, Tang, Heinecke 2019 arXiv:1904.06376, for sums of three bf16 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from loracle.model.layers.agreement import drawn
from loracle.model.layers.ops import has_kernels

# assumed: below, launches cost more than bytes
_FEWEST_TOKENS = 64
# Largest relative error against fp64 at which products count as those of fp32 (assumed).
# measured (benchmarks/adapter_precision.py): 3e-7 in parts, 4e-7 in fp32, 3e-4 in TF32
_WITHIN = 1e-5


@dataclass(frozen=True)
class _Scheme:
    """How an fp32 number is split into 16-bit ones."""

    a: tuple[int, ...]
    """Which part of A, 0 the largest, stands in each slot."""
    z: tuple[int, ...]
    """The same of the narrow product; slot by slot it meets the parts of B."""
    b: tuple[int, ...]
    """The same of B."""
    a_raised: float = 1.0
    """Factor of the smaller parts of A."""
    raised: float = 1.0
    """Factor of the smaller parts of z and B; the larger ones that they meet are divided by it."""
    lifted: float = 1.0
    """Factor of B before it is split."""


_SCHEMES = {
    torch.bfloat16: _Scheme(a=(0, 1, 2), z=(0, 0, 1, 0, 1, 2), b=(0, 1, 0, 2, 1, 0)),
    # The smallest normal number is 2^-14, and factors of an adapter are smaller than one.
    torch.float16: _Scheme(
        a=(0, 1), z=(0, 0, 1), b=(0, 1, 0), a_raised=2.0**11, raised=2.0**6, lifted=2.0**8
    ),
}


def add_update(
    out: Float[Tensor, "T O"],
    x: Float[Tensor, "T I"],
    a: Float32[Tensor, "r I"],
    b: Float32[Tensor, "O r"],
    *,
    scale: float,
) -> None:
    """Adds ``scale * x A^T B^T`` to ``out`` in place, with the precision of fp32."""
    if _takes_parts(x) and multiplies_exactly(x.device, x.dtype):
        add_update_in_parts(out, x, a, b, scale=scale)
    else:
        z = x.to(a.dtype) @ a.T
        out += (z @ b.T).mul_(scale)


def _takes_parts(x: Float[Tensor, "T I"]) -> bool:
    return x.dtype in _SCHEMES and len(x) >= _FEWEST_TOKENS and has_kernels(x.device)


def add_update_in_parts(
    out: Float[Tensor, "T O"],
    x: Float[Tensor, "T I"],
    a: Float32[Tensor, "r I"],
    b: Float32[Tensor, "O r"],
    *,
    scale: float,
) -> None:
    """Does the same by products in the dtype of ``x``, bf16 or fp16, that add up in fp32."""
    scheme, (rank, features) = _SCHEMES[x.dtype], a.shape
    flat = a.reshape(1, -1)
    stacked = parts(flat, like=x, slots=scheme.a, raised=scheme.a_raised).view(-1, features)
    z = _wide_product(x, stacked.T)
    narrow = parts(
        z,
        like=x,
        slots=scheme.z,
        raised=scheme.raised,
        terms=len(stacked) // rank,
        falls=1 / scheme.a_raised,
    )
    wide = parts(b, like=x, slots=scheme.b, raised=scheme.raised, lifted=scheme.lifted)
    out.addmm_(narrow, wide.T, alpha=scale / scheme.lifted)


@cache
def multiplies_exactly(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if this device's products of parts are those of fp32, by a test."""
    if device.type == "meta":
        return True
    like = torch.empty(0, device=device)
    x = drawn(_FEWEST_TOKENS, 512, like=like, seed=1).to(dtype)
    a = drawn(16, 512, like=like, seed=2, scale=0.05)
    b = drawn(256, 16, like=like, seed=3, scale=0.01)
    exact = x.double() @ a.double().T @ b.double().T
    # What the parts give beyond the rounded result shows how exact they are.
    out = (-exact).to(dtype)
    left = exact + out.double()
    add_update_in_parts(out, x, a, b, scale=1.0)
    return bool((out.double() - left).norm() <= _WITHIN * exact.norm())


def _wide_product(x: Float[Tensor, "T I"], y: Float[Tensor, "I R"]) -> Float32[Tensor, "T R"]:
    if x.device.type == "cpu":
        return x.float() @ y.float()
    return torch.mm(x, y, out_dtype=torch.float32)


def parts(
    x: Float32[Tensor, "T _"],
    *,
    like: Tensor,
    slots: Sequence[int],
    raised: float,
    lifted: float = 1.0,
    terms: int = 1,
    falls: float = 1.0,
) -> Float[Tensor, "T _"]:
    """Returns 16-bit numbers that add up to each fp32 one, part ``slots[i]`` in slot i.

    Args:
        x: Rows of ``terms`` slices, which are added up first.
        like: A tensor of the dtype wanted.
        slots: Parts, 0 the largest, of which the rows of the result are put together.
        raised: Factor of parts but the largest; the largest is divided by it after slot 0.
        lifted: Factor of the number before it is split.
        terms: Number of slices.
        falls: Factor of every slice but the first.
    """
    if x.device.type != "cpu":
        made: Tensor = torch.ops.loracle.parts(
            x.contiguous(), list(slots), raised, lifted, terms, falls, like.dtype
        )
        return made
    first, *others = x.view(len(x), terms, -1).unbind(dim=1)
    rest = first * lifted
    for other in others:
        rest = rest + other * (falls * lifted)
    found = []
    for part in range(3):
        found.append((rest * (raised if part else 1.0)).to(like.dtype))
        rest = rest - found[-1].float() / (raised if part else 1.0)
    return torch.cat(
        [found[part] if part or not i else found[0] / raised for i, part in enumerate(slots)], dim=1
    )
