"""Token-weighted likelihood, example by example.

Perplexity is exp(total NLL / total target tokens). A mean over batches or over examples would
depend on how they were grouped; this does not (reference: transformers#39241).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64
from torch import Tensor

from loracle.data import Example
from loracle.data.packing import batches_by_tokens, pack
from loracle.engine.out_of_memory import free_memory
from loracle.errors import NonFiniteError
from loracle.model.base import FrozenBase
from loracle.model.faults import is_out_of_memory
from loracle.model.layers.routing import Route
from loracle.records.result import perplexity_of

if TYPE_CHECKING:
    from loracle.model.blocks import Trunk
    from loracle.model.trunk import TrunkStore

Progress = Callable[[int], None]
"""Called with the number of examples just completed."""


@dataclass(frozen=True)
class ExampleScore:
    """The likelihood of one example's targets."""

    num_targets: int
    """Target tokens, EOS included."""
    nll_sum_nats: float
    """Sum of -ln p over the targets."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a set of examples."""

    loss_nats_per_token: float
    num_targets: int
    num_examples: int

    @property
    def perplexity(self) -> float | None:
        """Exponential of the loss; None: beyond the largest number."""
        return perplexity_of(self.loss_nats_per_token)


def score_examples(
    base: FrozenBase,
    examples: Sequence[Example],
    *,
    adapter: str | None,
    batch_tokens: int,
    progress: Progress = lambda _: None,
) -> list[ExampleScore]:
    """Returns the scores through one adapter or the base alone (`score_adapters`)."""
    (scores,) = score_adapters(
        base, examples, adapters=[adapter], batch_tokens=batch_tokens, progress=progress
    )
    return scores


def score_adapters(
    base: FrozenBase,
    examples: Sequence[Example],
    *,
    adapters: Sequence[str | None],
    batch_tokens: int,
    trunk: TrunkStore | None = None,
    entry_layer: int = 0,
    progress: Progress = lambda _: None,
) -> list[list[ExampleScore]]:
    """Returns the score of each example, in order, for each adapter.

    A row holds a batch of examples once per adapter, so one pass serves all adapters.

    Args:
        base: The frozen model.
        examples: Tokens and targets.
        adapters: Adapter names; None: the untuned base.
        batch_tokens: Tokens per forward pass; changes memory, nothing else.
        trunk: Hidden states that no adapter changes.
        entry_layer: Lowest decoder layer with a module of any of the adapters; the states that
            enter it come from ``trunk``.
        progress: Called after each pass.

    Raises:
        NonFiniteError: If an example's NLL is NaN or infinite.
    """
    by_length = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    copies = len(adapters)
    lengths = [copies * examples[i].num_tokens for i in by_length]
    parts: list[Tensor] = []
    for batch in batches_by_tokens(lengths, budget=batch_tokens):
        chosen = [examples[by_length[place]] for place in batch]
        store = trunk if entry_layer else None
        parts.append(
            _sums_that_fit(base, chosen, adapters=adapters, trunk=store, layer=entry_layer)
        )
        progress(len(chosen))
    # Copied once, because every copy to the host waits for the GPU.
    rows = torch.cat(parts, dim=1).tolist() if parts else [[]] * copies
    sums = [dict(zip(by_length, row, strict=True)) for row in rows]
    for adapter, row in zip(adapters, sums, strict=True):
        for index, value in row.items():
            if not math.isfinite(value):
                model = f"adapter '{adapter}'" if adapter else "the untuned base"
                number = examples[index].record.row
                raise NonFiniteError(
                    f"validation: the loss of {model} is {value} on record {number}"
                )
    return [
        [ExampleScore(examples[i].num_targets, row[i]) for i in range(len(examples))]
        for row in sums
    ]


def _sums_that_fit(
    base: FrozenBase,
    examples: Sequence[Example],
    *,
    adapters: Sequence[str | None],
    trunk: TrunkStore | None,
    layer: int,
) -> Float64[Tensor, "adapters examples"]:
    """Returns ``_nll_sums``; halves the examples when memory runs out."""
    try:
        states = trunk.states(examples, layer=layer) if trunk else None
        if states is not None:
            states = replace(states, states=states.states.repeat(len(adapters), 1))
        return _nll_sums(base, examples, adapters=adapters, trunk=states)
    except (RuntimeError, MemoryError) as error:
        if len(examples) == 1 or not is_out_of_memory(error):
            raise
    free_memory()
    middle = len(examples) // 2
    sums = [
        _sums_that_fit(base, half, adapters=adapters, trunk=trunk, layer=layer)
        for half in (examples[:middle], examples[middle:])
    ]
    return torch.cat(sums, dim=1)


def _nll_sums(
    base: FrozenBase,
    examples: Sequence[Example],
    *,
    adapters: Sequence[str | None],
    trunk: Trunk | None,
) -> Float64[Tensor, "adapters examples"]:
    """Returns the NLL of each example through each adapter, on the device."""
    row = pack(list(examples) * len(adapters), device=base.device)
    tokens = sum(example.num_tokens for example in examples)
    routes = [
        Route(adapter, index * tokens, (index + 1) * tokens)
        for index, adapter in enumerate(adapters)
        if adapter is not None
    ]
    with torch.no_grad():
        nll = base.token_nll(row, routes=routes, trunk=trunk)
    totals = torch.stack([part.double().sum() for part in nll.split(row.num_targets)])
    return totals.view(len(adapters), len(examples))


def likelihood(scores: Sequence[ExampleScore]) -> Likelihood:
    """Returns the token-weighted likelihood of all scored examples together."""
    tokens = sum(score.num_targets for score in scores)
    total = math.fsum(score.nll_sum_nats for score in scores)
    return Likelihood(total / tokens, tokens, len(scores))
