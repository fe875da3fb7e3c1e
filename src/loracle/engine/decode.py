"""Greedy decoding of many prompts through many adapters at once.

A batch holds every prompt once per adapter, padded on the left, with one cache. A sequence that has
ended leaves the batch. The composition of a batch depends on the prompts' lengths and on settings,
never on the answers, so base and tuned model start from the same batches.

Shapes: P prompts, S sequences still decoded (at most P times the adapters), W tokens of the longest
prompt, T tokens of a forward pass (W, then 1), V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from loracle.model.base import PROBES, FrozenBase
from loracle.model.faults import is_out_of_memory
from loracle.model.layers.routing import Route

CACHE_TOKENS = 16_384
"""Assumed: 0.4 GiB of bf16 keys and values for SmolLM2-135M, 8 GiB for LLaMA-2-7B."""

# assumed: a cache that differs by more than rounding is another model
_TOLERANCE_NATS = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BIT_NATS = 0.1
_PROBES = tuple(probe.input_ids for probe in PROBES)
_PROBE_STEPS = 2


def greedy(base: FrozenBase, *, max_new_tokens: int, min_new_tokens: int = 0) -> object:
    """Returns a Transformers generation config for greedy decoding.

    It replaces the model's own: some ship sampling settings that contradict greedy decoding
    (transformers#29665).
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(base.end_ids),
        pad_token_id=base.end_ids[0],
        bos_token_id=base.tokenizer.bos_token_id,
    )


def prompt_batches(
    lengths: Sequence[int], *, copies: int, max_new_tokens: int, cache_tokens: int, most: int | None
) -> list[list[int]]:
    """Returns indices of prompts to decode together, shortest first.

    A prompt whose copies exceed the cache gets its own batch.

    Args:
        lengths: Tokens of each prompt.
        copies: Number of adapters.
        max_new_tokens: Tokens per answer.
        cache_tokens: Positions of the padded cache of a batch.
        most: Limit on the prompts per batch; None: as many as fit the cache.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # The longest prompt so far sets the width of all.
        room = cache_tokens // (copies * (lengths[index] + max_new_tokens))
        if not batches or len(batches[-1]) + 1 > min(room, most or room):
            batches.append([])
        batches[-1].append(index)
    return batches


def decode_greedily(
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    adapters: Sequence[str | None],
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """Returns the new tokens of each adapter for each prompt, decoded as one batch.

    They end with one of the base's end tokens, or after ``max_new_tokens`` without one. An adapter
    of None is the untuned base; each prompt has at least one token.
    """
    tokens = _decode_together(base, prompts, adapters=adapters, max_new_tokens=max_new_tokens)
    answers = [_until(base.end_ids, new) for new in tokens.tolist()]
    return [answers[start : start + len(prompts)] for start in range(0, len(answers), len(prompts))]


def generate_greedily(
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    adapters: Sequence[str | None],
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """Returns the result of ``decode_greedily``, by Transformers' loop and adapter by adapter.

    For architectures that fail ``decodes_exactly``.
    """
    ids, mask = _left_padded(prompts, pad=base.end_ids[0], device=base.device)
    config = greedy(base, max_new_tokens=max_new_tokens)
    answers = []
    for adapter in adapters:
        with base.generating(() if adapter is None else (Route(adapter),)) as model:
            # Routes through the whole batch, whatever shape a layer sees.
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers.append([_until(base.end_ids, new) for new in out[:, ids.shape[1] :].tolist()])
    return answers


def decodes_exactly(base: FrozenBase, *, adapters: Sequence[str | None] = (None,)) -> bool:
    """Returns True if padding, positions, cache and routes do not change any adapter's predictions.

    Two prompts of unequal length are decoded for a few tokens as a batch and compared with separate
    passes over the whole sequences, each through one adapter. This needs no list of architectures.
    """
    starts = [probe[:-_PROBE_STEPS] for probe in _PROBES]
    ends = torch.tensor([probe[-_PROBE_STEPS:] for probe in _PROBES], device=base.device)
    ends = ends.repeat(len(adapters), 1)
    alone = [_last_logits(base, probe, adapter=name) for name in adapters for probe in _PROBES]
    with base.generating(()):
        try:
            batch = _Batch.of(starts, base=base, copies=len(adapters))
            live = range(len(batch.ids))
            routes = _routes(adapters, live=live, prompts=len(_PROBES))
            batch.forward(base, routes=routes)
            for step in range(_PROBE_STEPS):
                batch.append(ends[:, step])
                logits = batch.forward(base, routes=routes)
        # No positions, another cache, rows that are no sequences: anything can be raised.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
    whole = torch.cat(alone).double().log_softmax(dim=1)
    gaps = (whole - logits.double().log_softmax(dim=1)).abs().mean(dim=1)
    return gaps.max().item() <= _TOLERANCE_NATS.get(base.dtype, _TOLERANCE_16_BIT_NATS)


def _last_logits(
    base: FrozenBase, ids: Sequence[int], *, adapter: str | None
) -> Float[Tensor, "1 V"]:
    """Returns the logits after a sequence by itself, without a cache."""
    row = torch.tensor([ids], device=base.device)
    with base.generating(() if adapter is None else (Route(adapter),)) as model:
        last: Tensor = model(input_ids=row, use_cache=False).logits[:, -1]
    return last


@dataclass
class _Batch:
    """The unfinished sequences and the inputs of the next forward pass."""

    ids: Int64[Tensor, "S T"]
    mask: Int64[Tensor, "S seen"]
    """1 for a token, 0 for padding, at every position so far."""
    positions: Int64[Tensor, "S T"]
    cache: DynamicCache

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], *, base: FrozenBase, copies: int = 1) -> _Batch:
        """Returns the batch of ``copies`` repetitions of the prompts, before the first pass."""
        pad = base.end_ids[0]
        ids, mask = _left_padded(list(prompts) * copies, pad=pad, device=base.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return cls(ids, mask, positions, DynamicCache())

    def forward(self, base: FrozenBase, *, routes: Sequence[Route] = ()) -> Float[Tensor, "S V"]:
        """Returns the logits of each sequence's next token; ``routes`` count sequences."""
        inputs = {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        # Layers see the new tokens of each sequence, all that are cached, or one: the head.
        with base.router.following(routes, units=len(self.ids)):
            if not base.plain_head:
                last: Tensor = base.model(**inputs, logits_to_keep=1).logits
                return last[:, -1]
            states = base.model.get_decoder()(**inputs).last_hidden_state
            # As a matrix: for a slice of (S, T, H), PyTorch would copy the head once per sequence.
            logits: Tensor = base.model.get_output_embeddings()(states[:, -1])
        return logits

    def append(self, new: Int64[Tensor, " S"]) -> None:
        """Makes ``new`` the tokens of the next pass."""
        self.ids = new[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(new), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: Int64[Tensor, " kept"]) -> None:
        """Drops all sequences but ``rows``."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self.positions = self.positions[rows]
        self.cache.batch_select_indices(rows)


def _decode_together(
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    adapters: Sequence[str | None],
    max_new_tokens: int,
) -> Int64[Tensor, "all new"]:
    """Returns the new tokens of every sequence; those after an end token are undefined."""
    ends = torch.tensor(base.end_ids, device=base.device)
    every = _steps_per_check(base.device)
    batch = _Batch.of(prompts, base=base, copies=len(adapters))
    tokens = batch.ids.new_full((len(batch.ids), max_new_tokens), base.end_ids[0])
    live = torch.arange(len(tokens), device=base.device)
    routes = _routes(adapters, live=range(len(tokens)), prompts=len(prompts))
    with base.generating(()):
        for step in range(max_new_tokens):
            if step and step % every == 0:
                ended = torch.isin(tokens[live, :step], ends).any(dim=1)
                unfinished = (~ended).nonzero().squeeze(1)
                if len(unfinished) == 0:
                    break
                if len(unfinished) < len(live):
                    live = live[unfinished]
                    batch.keep(unfinished)
                    routes = _routes(adapters, live=live.tolist(), prompts=len(prompts))
            new = batch.forward(base, routes=routes).argmax(dim=1)
            tokens[live, step] = new
            batch.append(new)
    return tokens


class Answering:
    """A batch decoded one pass at a time, to measure or predict a pass.

    ``base`` must be inside ``base.generating``; prompts and adapters are as in ``decode_greedily``.
    """

    def __init__(
        self,
        base: FrozenBase,
        prompts: Sequence[Sequence[int]],
        *,
        adapters: Sequence[str | None],
    ) -> None:
        self._base = base
        self._batch = _Batch.of(prompts, base=base, copies=len(adapters))
        count = len(self._batch.ids)
        self._routes = _routes(adapters, live=range(count), prompts=len(prompts))

    def forward(self) -> None:
        """Decodes the next token of each answer."""
        new = self._batch.forward(self._base, routes=self._routes).argmax(dim=1)
        self._batch.append(new)

    def pretend_position(self, seen: int) -> None:
        """Resizes the cache as if ``seen`` positions had been decoded; its contents are lost."""
        for layer in self._batch.cache.layers:
            layer.keys, layer.values = (
                kept.new_empty((*kept.shape[:2], seen, kept.shape[3]))
                for kept in (layer.keys, layer.values)
            )
        self._batch.mask = self._batch.mask.new_ones(len(self._batch.ids), seen + 1)
        self._batch.positions = torch.full_like(self._batch.positions, seen)


def _steps_per_check(device: torch.device) -> int:
    # assumed: a GPU runs behind the host, and checking after every token would stall both
    return 1 if device.type == "cpu" else 8


def _routes(
    adapters: Sequence[str | None], *, live: Sequence[int], prompts: int
) -> tuple[Route, ...]:
    """Returns the range of live sequences of each adapter; the base needs no route."""
    edges = [bisect_left(live, index * prompts) for index in range(len(adapters) + 1)]
    spans = zip(adapters, edges, edges[1:], strict=False)
    return tuple(
        Route(adapter, start, stop)
        for adapter, start, stop in spans
        if adapter is not None and start < stop
    )


def _left_padded(
    prompts: Sequence[Sequence[int]], *, pad: int, device: torch.device
) -> tuple[Int64[Tensor, "S W"], Int64[Tensor, "S W"]]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until(ends: Sequence[int], new: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(new) if token in ends), len(new))
    return new[: end + 1]
