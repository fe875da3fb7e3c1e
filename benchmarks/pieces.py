"""The cost of a layer's pieces beside the code they replace, and their share of a step.

    python benchmarks/pieces.py [--geometry smollm2-135m] [--tokens 1280]

Random numbers at the default model's shapes, sequences as long as the demo's. Ours and the replaced
code alternate in one process. Forward and backward are timed together where a piece has both.
Writes ``results/benchmarks/pieces-<date>-<device>.json``.

Shapes: T tokens, H hidden, F feed-forward, D head size, V vocabulary, r rank.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

import loracle.model.layers.attention as attention
from figures import environment_of, publish, quartiles, sources_digest, table
from geometry import GEOMETRIES
from loracle.engine.device import choose_device, choose_dtype, keep_large_blocks, synchronize
from loracle.model.layers.dropout import DropoutStream, keep_bits, threshold_of, zero_dropped
from loracle.model.layers.head import target_nll
from loracle.model.layers.masked import Mask
from loracle.model.layers.norm import rms_norm

_DROPOUT = 0.1
_TARGET_SHARE = 0.6
"""assumed: share of the demo's tokens that belong to responses"""
# The demo's examples, 203 tokens on average and 512 at most.
_LENGTHS = (60, 84, 109, 132, 168, 210, 281, 400)
_WARM_UPS = 2

Call = Callable[[], Any]


@dataclass(frozen=True)
class Piece:
    """A piece of the step at the shapes of one pass."""

    ours: Call
    instead: Call | None
    """The replaced code; None if this is the model's own code."""
    calls: float
    """Calls per pass."""
    what: str
    """Description of the replaced code."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1280, help="tokens of one pass")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    report = measure(given.geometry, tokens=given.tokens, repeats=given.repeats)
    publish("pieces", report, text=markdown(report))


def measure(geometry: str, *, tokens: int, repeats: int) -> dict[str, Any]:
    """Returns the milliseconds of every piece, beside those of the code it replaces."""
    keep_large_blocks()
    device = choose_device("auto")
    dtype = choose_dtype("auto", device=device)
    settings = {key: value for key, value in GEOMETRIES[geometry].items() if key != "model_type"}
    shape = LlamaConfig(**settings)
    lengths = lengths_of(tokens)
    torch.manual_seed(0)
    pieces = pieces_of(shape, lengths=lengths, device=device, dtype=dtype)
    figures = {}
    for name, piece in pieces.items():
        calls = [piece.ours, *([piece.instead] if piece.instead else [])]
        ours, *rest = map(quartiles, alternating(calls, repeats=repeats, device=device))
        other = rest[0] if rest else None
        figures[name] = {
            "ms": ours,
            "instead": piece.what,
            "instead_ms": other,
            "times": other["median"] / ours["median"] if other else None,
            "calls_per_pass": piece.calls,
            "ms_per_pass": piece.calls * ours["median"],
        }
    return {
        "schema": 1,
        "what": "milliseconds of one call, forward and backward, ours beside what it replaces",
        "sources": sources_digest(),
        "environment": environment_of(device, dtype),
        "geometry": geometry,
        "lengths": lengths,
        "repeats": repeats,
        "pieces": figures,
    }


def lengths_of(tokens: int) -> tuple[int, ...]:
    """Returns sequence lengths like the demo's that add up to ``tokens``."""
    scaled = [max(1, length * tokens // sum(_LENGTHS)) for length in _LENGTHS]
    return (*scaled[:-1], tokens - sum(scaled[:-1]))


def pieces_of(
    shape: LlamaConfig, *, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, Piece]:
    """Returns the pieces of a pass with adapters on every linear layer."""
    tokens, layers = sum(lengths), shape.num_hidden_layers
    hidden, inner = shape.hidden_size, shape.intermediate_size

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, wide = draw(tokens, hidden), draw(tokens, inner)
    swiglu = _both_ways(
        lambda gate, up: silu(gate) * up,
        (draw(tokens, inner), draw(tokens, inner)),
        torch.ones_like(wide),
    )
    return {
        # q, k, v, o, gate and up read the hidden size; inputs are dropped twice, never stored.
        "dropping H features": _dropping(x, lengths=lengths, calls=12 * layers),
        "dropping F features": _dropping(wide, lengths=lengths, calls=2 * layers),
        "adding what is left, H": _adding(x, lengths=lengths, calls=6 * layers),
        "adding what is left, F": _adding(wide, lengths=lengths, calls=layers),
        "attention": _attention(shape, lengths=lengths, draw=draw),
        "RMSNorm": _norm(x, epsilon=shape.rms_norm_eps, calls=2 * layers + 1),
        "rotation of q and k": _rotation(shape, lengths=lengths, draw=draw),
        "SwiGLU": Piece(swiglu, None, layers, "the model's own"),
        "head and its loss": _head(shape, tokens=tokens, draw=draw),
    }


def _stream(lengths: tuple[int, ...]) -> DropoutStream:
    return DropoutStream(
        threshold=threshold_of(_DROPOUT),
        seed=0,
        step=0,
        slots=tuple(range(len(lengths))),
        lengths=lengths,
    )


def _dropping(x: Tensor, *, lengths: tuple[int, ...], calls: float) -> Piece:
    streams = (_stream(lengths),)
    return Piece(
        lambda: Mask(streams, "m").drop(x),
        lambda: zero_dropped(x, _bits(x, streams)),
        calls,
        "PyTorch's own kernels, the same bits",
    )


def _adding(x: Tensor, *, lengths: tuple[int, ...], calls: float) -> Piece:
    streams, out = (_stream(lengths),), torch.zeros_like(x)

    def plain() -> Tensor:
        return out.add_(zero_dropped(x, _bits(x, streams)))

    return Piece(
        lambda: Mask(streams, "m").add_dropped(out, x),
        plain,
        calls,
        "PyTorch's own kernels, the same bits",
    )


def _bits(x: Tensor, streams: tuple[DropoutStream, ...]) -> Tensor:
    return keep_bits(streams, module="m", features=x.shape[1], device=x.device)


def _attention(shape: LlamaConfig, *, lengths: tuple[int, ...], draw: Any) -> Piece:
    size = shape.hidden_size // shape.num_attention_heads
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    tokens, scale = sum(lengths), size**-0.5
    query, key, value = (draw(1, n, tokens, size) for n in (heads, groups, groups))
    gradient = draw(1, tokens, heads, size)
    module = torch.nn.Module()
    module.config = shape
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)

    def ours(*qkv: Tensor) -> Tensor:
        return attention.packed_attention(
            module, *qkv, None, lengths=lengths, ends=ends, scaling=scale
        )[0]

    def stock(*qkv: Tensor) -> Tensor:
        return attention._attend_by_sequence(*qkv, lengths=lengths, scale=scale)

    what = "PyTorch's attention and its gradient, by sequence"
    return _compared(ours, stock, (query, key, value), gradient, shape.num_hidden_layers, what)


def _norm(x: Tensor, *, epsilon: float, calls: float) -> Piece:
    stock = LlamaRMSNorm(x.shape[1], eps=epsilon).to(x.device, x.dtype).requires_grad_(False)

    def ours(rows: Tensor) -> Tensor:
        return rms_norm(rows, weight=stock.weight, epsilon=epsilon)

    return _compared(ours, stock, (x,), torch.ones_like(x), calls, "Transformers' norm")


def _rotation(shape: LlamaConfig, *, lengths: tuple[int, ...], draw: Any) -> Piece:
    size, tokens = shape.hidden_size // shape.num_attention_heads, sum(lengths)
    query, key = (
        draw(1, n, tokens, size) for n in (shape.num_attention_heads, shape.num_key_value_heads)
    )
    rotary = LlamaRotaryEmbedding(shape).to(query.device)
    positions = torch.cat([torch.arange(n, device=query.device) for n in lengths])[None]
    cos, sin = rotary(query, positions)

    def rotate(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(apply_rotary_pos_emb(q, k, cos, sin), dim=1)

    run = _both_ways(rotate, (query, key), torch.cat([query, key], dim=1))
    return Piece(run, None, shape.num_hidden_layers, "the model's own")


def _head(shape: LlamaConfig, *, tokens: int, draw: Any) -> Piece:
    targets = int(_TARGET_SHARE * tokens)
    # Logits as large as a trained model's. Larger ones make most probabilities denormal numbers,
    # whose exponential takes ten times as long.
    hidden = draw(targets, shape.hidden_size) * (2.5 / shape.hidden_size**0.5)
    weight = draw(shape.vocab_size, shape.hidden_size)
    ids = torch.arange(targets, device=weight.device) * 7 % shape.vocab_size

    def ours(rows: Tensor) -> Tensor:
        return target_nll(rows, weight=weight, bias=None, targets=ids)

    def stock(rows: Tensor) -> Tensor:
        logits = linear(rows, weight).float()
        return torch.nn.functional.cross_entropy(logits, ids, reduction="none")

    ones = torch.ones(targets, device=weight.device)
    return _compared(ours, stock, (hidden,), ones, 1, "all logits at once and autograd")


def _compared(
    ours: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    gradient: Tensor,
    calls: float,
    what: str,
) -> Piece:
    both = (_both_ways(call, inputs, gradient) for call in (ours, stock))
    return Piece(*both, calls, what)


def _both_ways(call: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> Call:
    """Returns the call with its backward pass, on its own copies of the inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]

    def run() -> None:
        torch.autograd.grad(call(*leaves), leaves, gradient)

    return run


def alternating(calls: Sequence[Call], *, repeats: int, device: torch.device) -> list[list[float]]:
    """Returns the milliseconds of alternating calls, by call, after warm-ups."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + _WARM_UPS):
        for call, milliseconds in zip(calls, times, strict=True):
            synchronize(device)
            started_at = time.perf_counter()
            call()
            synchronize(device)
            if turn >= _WARM_UPS:
                milliseconds.append(1000 * (time.perf_counter() - started_at))
    return times


def markdown(report: dict[str, Any]) -> str:
    """Returns the table of pieces."""
    rows = []
    for name, piece in report["pieces"].items():
        other, times = piece["instead_ms"], piece["times"]
        rows.append(
            (
                name,
                f"{piece['ms']['median']:.2f}",
                f"{other['median']:.2f}" if other else "n/a",
                f"{times:.1f}" if times else "n/a",
                f"{piece['ms_per_pass']:.0f}",
            )
        )
    header = ("piece", "ms", "instead, ms", "times", "ms per pass of ours")
    return table(header, rows)


if __name__ == "__main__":
    main()
