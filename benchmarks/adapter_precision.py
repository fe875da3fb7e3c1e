"""How exact an adapter's product of scores and answers is, by the kinds of products a GPU has.

    python benchmarks/adapter_precision.py [--tokens 256]

Products are emulated on a CPU: 16-bit operands, added up in fp32. Each way is compared with fp64,
and its output, rounded to bf16, with PEFT's fp32 product; scores and answers take three bf16 parts
(``loracle/model/layers/adapter_precision.py``).
Writes ``results/benchmarks/adapter_precision-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from figures import environment_of, publish, table
from loracle.model.layers.adapter_precision import add_update_in_parts

RANK = 16
SCALE = 2.0
SHAPES = {
    "LLaMA-2-7B q_proj": (4096, 4096),
    "LLaMA-2-7B up_proj": (4096, 11008),
    "LLaMA-2-7B down_proj": (11008, 4096),
    "SmolLM2-135M q_proj": (576, 576),
    "SmolLM2-135M down_proj": (1536, 576),
}
# source: bits of the fraction of TF32, of NVIDIA's A100 white paper
_TF32_BITS = 10


class Operands(NamedTuple):
    """Inputs of one product."""

    out: Tensor
    x: Tensor
    a: Tensor
    b: Tensor


def drawn(features: int, width: int, *, tokens: int, trained: bool) -> Operands:
    """Returns random operands: ``out`` and ``x`` in bf16, the factors in fp32.

    Factors like trained ones (assumed): A as PEFT draws it plus a change of a tenth, B of the size
    of a few hundred steps of 3e-4, and four features of ``x`` a hundred times as large as the rest.
    """
    draw = torch.Generator().manual_seed(features + width + trained)
    x = torch.randn(tokens, features, generator=draw)
    a = (torch.rand(RANK, features, generator=draw) * 2 - 1) * features**-0.5
    b = torch.randn(width, RANK, generator=draw) * 0.01
    if trained:
        x[:, torch.randperm(features, generator=draw)[:4]] *= 100
        a += torch.randn(a.shape, generator=draw) * 0.1 * features**-0.5
        b *= 0.3
    out = torch.randn(tokens, width, generator=draw)
    return Operands(out.bfloat16(), x.bfloat16(), a, b)


def by_fp32(given: Operands) -> Tensor:
    return given.x.float() @ given.a.T @ given.b.T * SCALE


def by_bf16(given: Operands) -> Tensor:
    z = (given.x.float() @ given.a.bfloat16().float().T).bfloat16().float()
    return z @ given.b.bfloat16().float().T * SCALE


def by_parts(count: int) -> Callable[[Operands], Tensor]:
    """Returns products of ``count`` bf16 parts of each fp32 number."""

    def product(given: Operands) -> Tensor:
        x = given.x.float()
        z = sum(x @ part.T for part in _bf16(given.a, count))
        return _pairs(_bf16(z, count), _bf16(given.b, count), count) * SCALE

    return product


def by_tf32(count: int) -> Callable[[Operands], Tensor]:
    """Returns products of ``count`` TF32 parts of each fp32 number."""

    def product(given: Operands) -> Tensor:
        x = given.x.float()
        z = sum(x @ part.T for part in _tf32(given.a, count))
        return _pairs(_tf32(z, count), _tf32(given.b, count), count) * SCALE

    return product


def _pairs(left: list[Tensor], right: list[Tensor], count: int) -> Any:
    return sum(left[i] @ right[j].T for i in range(count) for j in range(count) if i + j < count)


def _bf16(number: Any, count: int) -> list[Tensor]:
    return list(_parts(number, lambda rest: rest.bfloat16().float(), count))


def _tf32(number: Any, count: int) -> list[Tensor]:
    return list(_parts(number, _rounded_to_tf32, count))


def _parts(number: Tensor, rounded: Callable[[Tensor], Tensor], count: int) -> Iterator[Tensor]:
    for _ in range(count):
        part = rounded(number)
        yield part
        number = number - part


def _rounded_to_tf32(number: Tensor) -> Tensor:
    dropped = 23 - _TF32_BITS
    bits = number.view(torch.int32) + (1 << (dropped - 1))
    return (bits & -(1 << dropped)).view(torch.float32)


WAYS: dict[str, Callable[[Operands], Tensor]] = {
    "fp32 (PEFT)": by_fp32,
    "bf16": by_bf16,
    "2 bf16 parts": by_parts(2),
    "3 bf16 parts": by_parts(3),
    "TF32": by_tf32(1),
    "2 TF32 parts (TF32x3)": by_tf32(2),
}
_CODE = {"parts, bf16": torch.bfloat16, "parts, fp16": torch.float16}


def measure(given: Operands) -> dict[str, dict[str, float]]:
    """Returns each way's errors and the share of outputs that PEFT rounds otherwise."""
    exact = given.x.double() @ given.a.double().T @ given.b.double().T * SCALE
    peft = (given.out + by_fp32(given)).bfloat16()
    found = {}
    for name, way in WAYS.items():
        update = way(given)
        out = (given.out + update).bfloat16()
        found[name] = _errors(update, exact) | {"rounded_otherwise": _share(out != peft)}
    for name, dtype in _CODE.items():
        found[name] = _of_the_code(given, dtype)
    return found


def _of_the_code(given: Operands, dtype: torch.dtype) -> dict[str, float]:
    """Returns the share for what the code does; a CPU too rounds the sum of ``addmm_`` once."""
    x, peft, own = given.x.to(dtype), given.out.to(dtype), given.out.to(dtype)
    peft += (x.float() @ given.a.T @ given.b.T).mul_(SCALE)
    add_update_in_parts(own, x, given.a, given.b, scale=SCALE)
    return {"rounded_otherwise": _share(own != peft)}


def _errors(update: Tensor, exact: Tensor) -> dict[str, float]:
    gap = update.double() - exact
    return {
        "relative_error": (gap.norm() / exact.norm()).item(),
        "largest_error": (gap.abs().max() / exact.abs().max()).item(),
    }


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()


def rows_of(found: dict[str, Any]) -> Iterable[list[str]]:
    for name, ways in found.items():
        for way, row in ways.items():
            yield [
                f"{name}, {way}",
                *(f"{row[key]:.1e}" if key in row else "" for key in _COLUMNS),
            ]


_COLUMNS = ("relative_error", "largest_error", "rounded_otherwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    found = {
        f"{name}, {'trained-like' if trained else 'random'}": measure(
            drawn(*shape, tokens=args.tokens, trained=trained)
        )
        for name, shape in SHAPES.items()
        for trained in (False, True)
    }
    report = {
        "tokens": args.tokens,
        "rank": RANK,
        "products": found,
        "environment": environment_of(torch.device("cpu"), torch.bfloat16),
    }
    text = table(["product", "relative error", "largest", "rounded otherwise"], rows_of(found))
    publish("adapter_precision", report, text=text)


if __name__ == "__main__":
    main()
