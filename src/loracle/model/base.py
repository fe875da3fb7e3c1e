"""The frozen base: loaded once (`loracle.model.load`), shared by every run, never modified.

Shapes: T tokens in the row, N targets, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loracle.data import end_ids_of
from loracle.data.packing import PackedRow, Tokens, pack
from loracle.errors import ModelError
from loracle.model.blocks import (
    Trunk,
    blocks_name_of,
    blocks_stand_alone,
    replaying,
    states_entering,
)
from loracle.model.layers.attention import PACKED, without_cudnn_attention
from loracle.model.layers.four_bit import PackedWeight, weight_of
from loracle.model.layers.head import as_float, target_nll, trained_target_nll
from loracle.model.layers.lora import RoutedLinear
from loracle.model.layers.recompute import recomputing
from loracle.model.layers.routing import Route, Router
from loracle.model.live_bytes import computing


@dataclass
class FrozenBase:
    """A model with frozen weights, its tokenizer, and the router of its adapters."""

    model: PreTrainedModel
    """The causal language model; PEFT layers are put into it in place."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    router: Router = field(default_factory=Router)
    peft: PeftModel | None = None
    """PEFT's view of the same model; None before the first adapter."""
    plain_head: bool = True
    """True if the logits are hidden states times one matrix, nothing else."""
    trains: bool = False
    """True in full fine-tuning: its weights train in fp32 and are used in ``dtype``."""
    quantization: str | None = None
    """``nf4``: linear layers but the head are stored in 4 bits, products are in ``dtype``."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end an answer, the one that is learned first; by default the tokenizer's EOS."""
    notices: tuple[str, ...] = ()
    """Lines for a person about what runs slower than it could."""

    def __post_init__(self) -> None:
        self.end_ids = self.end_ids or end_ids_of(self.tokenizer)

    def token_nll(
        self,
        row: PackedRow,
        *,
        routes: Sequence[Route],
        trunk: Trunk | None = None,
        recompute_from: int | None = None,
    ) -> Float[Tensor, " N"]:
        """Returns -ln p of every target of the row, in nats, through the adapters of ``routes``.

        Args:
            row: The sequences, end to end.
            routes: Which tokens go through which adapter.
            trunk: Hidden states from which the pass starts, if no routed adapter has a module
                below; equal up to rounding to a pass over the tokens.
            recompute_from: Lowest decoder layer that keeps only its input for the gradient, which
                has the same bits. None: all layers keep their activations.
        """
        with ExitStack() as changed:
            if trunk is not None:
                below = self.blocks[: trunk.layer]
                changed.enter_context(replaying(below, lambda: trunk.states[None]))
            if recompute_from is not None:
                above = self.blocks[recompute_from:]
                changed.enter_context(recomputing(above, router=self.router))
            return self._nll_from_tokens(row, routes=routes)

    def _nll_from_tokens(self, row: PackedRow, *, routes: Sequence[Route]) -> Float[Tensor, " N"]:
        head = self.model.get_output_embeddings()
        adapted = isinstance(head, RoutedLinear)
        if not self.plain_head and adapted:
            raise ModelError(
                f"{type(self.model).__name__}: its logits are more than one matrix product, so its "
                "output head cannot take an adapter; leave lm_head out of lora.placement"
            )
        with self.router.following(routes, units=row.num_tokens), self.precision():
            if not self.plain_head:
                return self.nll_from_logits(row)
            hidden = self.model.get_decoder()(**_inputs(row)).last_hidden_state[0, row.source]
            bias = getattr(head, "bias", None)
            if self.trains:
                with computing("head"):
                    return trained_target_nll(
                        hidden, weight=head.weight, bias=bias, targets=row.targets
                    )
        if adapted:
            at_targets = _at_targets(row, routes)
            units = sum(row.num_targets)
            with self.router.following(at_targets, units=units), computing("head"):
                return cross_entropy(head(hidden), row.targets)
        with computing("head"):
            return target_nll(hidden, weight=head.weight, bias=bias, targets=row.targets)

    def nll_from_logits(self, row: PackedRow) -> Float[Tensor, " N"]:
        """Returns -ln p of every target by the model's own logits, through the router's routes."""
        with self.precision():
            logits = self.model(**_inputs(row), logits_to_keep=row.source).logits[0]
        return cross_entropy(logits, row.targets)

    def precision(self) -> AbstractContextManager[None]:
        """Returns a context in which products are in ``dtype``, also those of fp32 weights."""
        if not self.trains or self.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @cached_property
    def blocks_name(self) -> str:
        """Full name of the decoder's list of layers."""
        return blocks_name_of(self.model)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder's layers, in order."""
        return tuple(self.model.get_submodule(self.blocks_name).children())

    @cached_property
    def has_trunk(self) -> bool:
        """True if a forward pass may start at any layer; tested on probes at first use."""
        row = pack(PROBES[:1], device=self.device)
        other = pack([Probe(PROBES[0].input_ids[::-1])], device=self.device)
        with torch.no_grad(), self.router.following(()):
            if not blocks_stand_alone(
                self.blocks,
                run=lambda: self._decode(row),
                run_other=lambda: self._decode(other),
            ):
                return False
            whole = self.token_nll(row, routes=())
            for layer in (1, len(self.blocks)):
                trunk = Trunk(layer, self.states_entering(layer, example=PROBES[0]))
                if not torch.equal(whole, self.token_nll(row, routes=(), trunk=trunk)):
                    return False
        return True

    def states_entering(self, layer: int, *, example: Tokens) -> Float[Tensor, "T H"]:
        """Returns the input of decoder layer ``layer`` (from 1) of the base alone."""
        row = pack([example], device=self.device)
        with torch.no_grad(), self.router.following(()):
            return states_entering(layer, blocks=self.blocks, run=lambda: self._decode(row))

    def _decode(self, row: PackedRow) -> object:
        return self.model.get_decoder()(**_inputs(row))

    @contextmanager
    def generating(self, routes: Sequence[Route]) -> Iterator[PreTrainedModel]:
        """Switches the model to ordinary batched attention, for decoding with a cache."""
        self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")
        try:
            with (
                self.router.following(routes),
                self.precision(),
                without_cudnn_attention(),
                torch.inference_mode(),
            ):
                yield self.model
        finally:
            self.model.set_attn_implementation(PACKED)

    def release(self) -> None:
        """Frees every tensor of the model, which cannot be used any more."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.new_empty(0)
            tensor.grad = None

    def frozen_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every weight and buffer of the base, by its name without adapters."""
        for name, tensor in sorted(self.model.state_dict().items()):
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), tensor

    def held_tensors(self) -> Iterator[Tensor]:
        """Yields every tensor of the base that stays in memory, without adapters."""
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                yield parameter
        yield from self.model.buffers()
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and isinstance(
                packed := weight_of(module), PackedWeight
            ):
                yield from packed.parts()

    def weights_digest(self) -> str:
        """Returns a SHA-256 over name, dtype, shape and bits of every frozen weight."""
        digest = hashlib.sha256()
        for name, tensor in self.frozen_weights():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Probe:
    """A few tokens that exist in every vocabulary."""

    input_ids: tuple[int, ...]
    num_prompt: int = 1


PROBES = (Probe((3, 5, 4, 6, 3, 4, 7, 5)), Probe((6, 3, 7, 4, 5)))
"""Sequences on which a base is tested."""


def cross_entropy(logits: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, " N"]:
    """Returns -ln p of each target, in nats, the softmax in fp32 or wider."""
    return nn.functional.cross_entropy(as_float(logits), targets, reduction="none")


def _at_targets(row: PackedRow, routes: Sequence[Route]) -> list[Route]:
    """Returns the routes over target positions, which are the only ones at the output head."""
    tokens = [0, *accumulate(row.lengths)]
    targets = dict(zip(tokens, [0, *accumulate(row.num_targets)], strict=True))
    moved = []
    for route in routes:
        stop = row.num_tokens if route.stop is None else route.stop
        sequences = slice(tokens.index(route.start), tokens.index(stop))
        stream = route.dropout and replace(route.dropout, lengths=row.num_targets[sequences])
        moved.append(Route(route.adapter, targets[route.start], targets[stop], stream))
    return moved


def _inputs(row: PackedRow) -> dict[str, object]:
    return {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "use_cache": False,
        "lengths": row.lengths,
        "ends": row.ends,
    }
