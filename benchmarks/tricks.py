"""The engine's tricks, each with a context manager that switches it off.

The replacement is the obvious code, written here and not in the engine. A new trick is one more
entry of ``TRICKS``.

Shapes: T tokens in the row, N targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from transformers import AttentionInterface

import loracle.model.base
import loracle.model.layers.attention
import loracle.model.layers.lora
import loracle.model.layers.masked
from loracle.data.packing import PackedRow
from loracle.model.base import FrozenBase
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.compiled import SWITCH
from loracle.model.layers.lora import RoutedLinear
from loracle.model.layers.masked import Mask
from loracle.seeds import stream_seed

Without = Callable[[FrozenBase], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Trick:
    """An optimization of the engine, and its replacement."""

    instead: str
    """Description of the replacement."""
    without: Without
    """Context manager that switches it off for a base."""


def whole_logits(_base: FrozenBase) -> AbstractContextManager[Any]:
    """Computes all logits of the targets at once, with autograd's gradient."""

    def target_nll(hidden: Tensor, *, weight: Tensor, bias: Any, targets: Tensor) -> Tensor:
        return cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")

    return mock.patch.object(loracle.model.base, "target_nll", target_nll)


def every_position(_base: FrozenBase) -> AbstractContextManager[Any]:
    """Computes the head and its loss at every token of the row, prompts included."""
    own = FrozenBase.token_nll

    def token_nll(self: FrozenBase, row: PackedRow, **given: Any) -> Tensor:
        everywhere = replace(
            row,
            source=torch.arange(row.num_tokens, device=row.source.device),
            targets=row.input_ids[0].roll(-1),
            num_targets=row.lengths,
        )
        return own(self, everywhere, **given)[row.source]

    return mock.patch.object(FrozenBase, "token_nll", token_nll)


@contextmanager
def one_masked_attention(_base: FrozenBase) -> Iterator[None]:
    """Calls attention once over the whole row, with a mask of T x T."""
    masks: dict[tuple[int, ...], Tensor] = {}

    def attend(
        _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        lengths = given["lengths"]
        if lengths not in masks:
            masks[lengths] = block_mask(lengths, device=query.device)
        groups = query.shape[1] // key.shape[1]
        out = scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            attn_mask=masks[lengths],
            scale=given.get("scaling"),
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(PACKED, attend)
    try:
        yield
    finally:
        register_packed_attention()


def block_mask(lengths: tuple[int, ...], *, device: torch.device) -> Tensor:
    """Returns True where a token attends: to itself and earlier ones of its own sequence."""
    ones = [
        torch.ones(length, length, dtype=torch.bool, device=device).tril() for length in lengths
    ]
    return torch.block_diag(*ones)


def stock_attention(_base: FrozenBase) -> AbstractContextManager[Any]:
    """Calls PyTorch's attention, with its gradient, for one sequence after another."""
    module = loracle.model.layers.attention
    names = ("attend_on_cpu", "attend_variable_length")

    def by_sequence(*qkv: Tensor, lengths: tuple[int, ...], scale: float, **_: Any) -> Tensor:
        return module._attend_by_sequence(*qkv, lengths=lengths, scale=scale)

    return mock.patch.multiple(module, **dict.fromkeys(names, by_sequence))


def plain_kernels(_base: FrozenBase) -> AbstractContextManager[Any]:
    """Makes and applies masks with PyTorch's own kernels."""
    return mock.patch.dict(os.environ, {SWITCH: "plain"})


@contextmanager
def framework_dropout(base: FrozenBase) -> Iterator[None]:
    """Draws masks with ``torch.nn.functional.dropout``, again in the backward pass."""

    def keep_bits(streams: Any, *, module: str, features: int, device: torch.device) -> Tensor:
        (stream,) = streams
        drop = stream.threshold / 2**15
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(stream.seed, stream.step, module))
            ones = torch.ones(sum(stream.lengths), features, dtype=torch.bfloat16, device=device)
            return -(torch.nn.functional.dropout(ones, p=drop) > 0).to(torch.int16)

    with (
        plain_kernels(base),
        mock.patch.object(loracle.model.layers.masked, "keep_bits", keep_bits),
    ):
        yield


@contextmanager
def no_dropout(_base: FrozenBase) -> Iterator[None]:
    """No dropout at all: what the masks cost, not a way to do without them."""
    with mock.patch.object(loracle.model.layers.lora, "_mask", lambda _, module: Mask((), module)):
        yield


@contextmanager
def pefts_forward(base: FrozenBase) -> Iterator[None]:
    """Uses PEFT's LoRA layer under autograd, with an fp32 copy of the input per module."""
    layers = [m for m in base.model.modules() if isinstance(m, RoutedLinear)]
    for layer in layers:
        layer.lora_dropout.train()

    def forward(self: RoutedLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return PeftLinear.forward(self, x, *args, **kwargs)

    try:
        with mock.patch.object(RoutedLinear, "forward", forward):
            yield
    finally:
        for layer in layers:
            layer.lora_dropout.eval()


@contextmanager
def stock_norms(base: FrozenBase) -> Iterator[None]:
    """Uses the model's own RMSNorm under autograd."""
    replaced = {
        module: module.__dict__.pop("forward")
        for module in base.model.modules()
        if type(module).__name__.endswith("RMSNorm") and "forward" in module.__dict__
    }
    try:
        yield
    finally:
        for module, forward in replaced.items():
            module.forward = forward


TRICKS: dict[str, Trick] = {
    "head in chunks": Trick("all logits at once", whole_logits),
    "head at targets only": Trick("head at every token", every_position),
    "attention by sequence": Trick("one call with a T x T mask", one_masked_attention),
    "attention's own gradient": Trick("PyTorch's, by sequence", stock_attention),
    "masks in one pass": Trick("PyTorch's own kernels, the same bits", plain_kernels),
    "counted masks": Trick("F.dropout, forward and back", framework_dropout),
    "RMSNorm's own gradient": Trick("the model's norm under autograd", stock_norms),
    "own LoRA product": Trick("PEFT's forward under autograd", pefts_forward),
    "(dropout)": Trick("no dropout at all", no_dropout),
}
