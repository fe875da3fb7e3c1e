"""Token-weighted likelihood and text scores, example by example.

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

from loracle.config.bleu import DEFAULT, bleu_metric
from loracle.data import Example
from loracle.data.packing import batches_by_tokens, pack
from loracle.engine.decode import (
    CACHE_TOKENS,
    decode_greedily,
    decodes_exactly,
    generate_greedily,
    prompt_batches,
)
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


@dataclass(frozen=True)
class Answer:
    """A greedy answer to one instruction."""

    text: str
    hit_limit: bool
    """True if the answer was cut at the token limit, without a token that ends it."""


@dataclass(frozen=True)
class TextScore:
    """Corpus scores of a set of answers against the records' responses."""

    bleu: float
    """sacreBLEU corpus BLEU, 0 to 100; an empty answer counts."""
    bleu_signature: str
    chrf: float
    """sacreBLEU corpus chrF, 0 to 100."""
    chrf_signature: str
    hit_limit_frac: float
    """Fraction of answers cut at the token limit."""
    num_answers: int
    bleu_tokenize: str = DEFAULT


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


def answer_prompts(
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: str | None,
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: Progress = lambda _: None,
) -> list[Answer]:
    """Returns the answers of one adapter or the base alone (`answer_with_adapters`)."""
    (answers,) = answer_with_adapters(
        base,
        prompts,
        adapters=[adapter],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return answers


def answer_with_adapters(
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    adapters: Sequence[str | None],
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: Progress = lambda _: None,
) -> list[list[Answer]]:
    """Returns the greedy answer to each prompt, in order, for each adapter.

    Batches of prompts of similar length depend on their lengths and these settings only, so base
    and tuned model see the same batches.

    Args:
        base: The frozen model.
        prompts: Token ids of each prompt.
        adapters: Adapter names; None: the untuned base.
        max_new_tokens: Tokens per answer.
        batch_size: Limit on the prompts per batch; None: as many as fit ``CACHE_TOKENS``.
        progress: Called after each batch with its number of prompts.
    """
    batches = prompt_batches(
        [len(prompt) for prompt in prompts],
        copies=len(adapters),
        max_new_tokens=max_new_tokens,
        cache_tokens=CACHE_TOKENS,
        most=batch_size,
    )
    exact = bool(prompts) and decodes_exactly(base, adapters=adapters)
    decode = decode_greedily if exact else generate_greedily
    answers: list[dict[int, Answer]] = [{} for _ in adapters]
    for indices in batches:
        chosen = [prompts[i] for i in indices]
        decoded = decode(base, chosen, adapters=adapters, max_new_tokens=max_new_tokens)
        for by_index, tokens in zip(answers, decoded, strict=True):
            by_index |= zip(indices, (_answer(base, new) for new in tokens), strict=True)
        progress(len(indices))
    return [[by_index[i] for i in range(len(prompts))] for by_index in answers]


def _answer(base: FrozenBase, new: list[int]) -> Answer:
    ended = bool(new) and new[-1] in base.end_ids
    text = base.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
    return Answer(text, hit_limit=not ended)


def score_answers(
    answers: Sequence[Answer], *, references: Sequence[str], tokenizer: str = DEFAULT
) -> TextScore:
    """Returns corpus BLEU, of the tokenizer's words, and chrF of the answers, one reference each.

    Source: Post 2018 arXiv:1804.08771; Popović 2015 (chrF), as sacreBLEU computes them.
    """
    from sacrebleu.metrics import CHRF

    bleu, chrf = bleu_metric(tokenizer), CHRF()
    texts = [answer.text for answer in answers]
    bleu_score = bleu.corpus_score(texts, [list(references)])
    chrf_score = chrf.corpus_score(texts, [list(references)])
    return TextScore(
        bleu=bleu_score.score,
        bleu_signature=str(bleu.get_signature()),
        chrf=chrf_score.score,
        chrf_signature=str(chrf.get_signature()),
        hit_limit_frac=sum(answer.hit_limit for answer in answers) / len(answers),
        num_answers=len(answers),
        bleu_tokenize=tokenizer,
    )
