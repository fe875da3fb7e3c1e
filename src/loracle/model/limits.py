"""How far a base's embeddings and positions reach, checked before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loracle.data.packing import pack
from loracle.errors import ModelError
from loracle.model.base import PROBES, FrozenBase


def require_embedded(base: FrozenBase, *, name: str) -> None:
    """Checks that the base has a row for every token that a text can have.

    A special token beyond them does no harm, because texts are only texts: some tokenizers have one
    for padding that the model never saw.

    Raises:
        ModelError: Naming the first token without a row.
    """
    tokenizer = base.tokenizer
    rows = base.model.get_input_embeddings().weight.shape[0]
    unused = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    beyond = {t: i for t, i in tokenizer.get_vocab().items() if i >= rows and i not in unused}
    if beyond:
        first = min(beyond, key=lambda token: beyond[token])
        raise ModelError(
            f"{name}: the tokenizer has {len(beyond)} tokens beyond the model's {rows} embedding "
            f"rows, first {json.dumps(first)} (id {beyond[first]}); they are not of one model"
        )


@dataclass(frozen=True)
class Reach:
    """The longest sequence that a base can be used on, and why."""

    tokens: int
    why: str


def reach_of(base: FrozenBase) -> Reach | None:
    """Returns how long sequences may be; None if nothing in the model says.

    Learned positions end with their table. A rope that is rescaled for long sequences is one for
    the whole row or batch, so that a loss would depend on what else is in it.
    """
    limits = [*_learned_positions(base), *_rescaled_ropes(base.model.config.get_text_config())]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def require_reach(base: FrozenBase, *, tokens: int, what: str, remedy: str) -> None:
    """Checks that sequences of ``tokens`` can be used.

    Args:
        base: The base.
        tokens: Tokens of the longest sequence.
        what: Names it in the message.
        remedy: What to do, with ``{}`` for the limit.

    Raises:
        ModelError: If they are longer than the base reaches.
    """
    reach = reach_of(base)
    if reach is not None and tokens > reach.tokens:
        raise ModelError(
            f"{type(base.model).__name__}: {what} need {tokens} positions, and {reach.why}; "
            f"{remedy.format(reach.tokens)}"
        )


def _learned_positions(base: FrozenBase) -> Iterator[Reach]:
    """Yields the size of every table that a test pass looks up by position."""
    row = pack(PROBES, device=base.device)
    with torch.inference_mode(), _Lookups() as lookups:
        base.nll_from_logits(row)
    for rows, index in lookups.seen:
        if index.numel() != row.num_tokens:
            continue
        offset = index.flatten() - row.position_ids.flatten()
        if (offset == offset[0]).all():
            tokens = rows - int(offset[0])
            yield Reach(tokens, f"the model has learned {tokens}")


class _Lookups(TorchFunctionMode):
    """Notes the rows of every table that is looked up, and what is looked up in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            index, table = args[:2]
            self.seen.append((table.shape[0], index))
        return func(*args, **(kwargs or {}))


def _rescaled_ropes(config: Any) -> Iterator[Reach]:
    ropes: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(part for part in ropes.values() if isinstance(part, Mapping))]:
        kind = str(rope.get("rope_type"))
        tokens = config.max_position_embeddings
        if kind == "longrope":
            tokens = rope.get("original_max_position_embeddings") or tokens
        elif "dynamic" not in kind:
            continue
        yield Reach(int(tokens), f"beyond {tokens} its rope (type {kind}) differs between rows")
