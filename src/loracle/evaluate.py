"""Token-weighted likelihood and BLEU, with the outcome of every example kept.

Perplexity is exp(total NLL / total target tokens). A mean over batches or over examples would
depend on how they were grouped; this does not (reference: transformers#39241).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from loracle.data import Example
from loracle.data.packing import batches_by_tokens, pack
from loracle.errors import NonFiniteError
from loracle.model.base import FrozenBase
from loracle.model.lora import Route

Progress = Callable[[int], None]
"""Called with the number of examples just done."""


@dataclass(frozen=True)
class ExampleScore:
    """The likelihood of one example's targets."""

    num_targets: int
    """Target tokens, EOS included."""
    nll_sum_nats: float
    """Sum of -ln p over them."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a set of examples."""

    loss_nats_per_token: float
    num_targets: int
    num_examples: int

    @property
    def perplexity(self) -> float:
        """Exp of the loss."""
        return math.exp(self.loss_nats_per_token)


@dataclass(frozen=True)
class Answer:
    """A greedy answer to one instruction."""

    text: str
    hit_limit: bool
    """The answer was cut at the token limit; no EOS came."""


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


def routes_to(adapter: str | None) -> tuple[Route, ...]:
    """Returns the routes of a pass through one adapter without dropout, or the base alone."""
    return () if adapter is None else (Route(adapter),)


def score_examples(
    base: FrozenBase,
    examples: Sequence[Example],
    *,
    adapter: str | None,
    batch_tokens: int,
    progress: Progress = lambda _: None,
) -> list[ExampleScore]:
    """Returns the score of each example, in order.

    Args:
        base: The frozen model.
        examples: Tokens and targets.
        adapter: Adapter name; None: the untuned base.
        batch_tokens: Tokens per forward pass; changes memory, nothing else.
        progress: Called after each pass.

    Raises:
        NonFiniteError: If an example's NLL is NaN or infinite.
    """
    by_length = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    lengths = [examples[i].num_tokens for i in by_length]
    sums: dict[int, float] = {}
    for batch in batches_by_tokens(lengths, budget=batch_tokens):
        indices = [by_length[place] for place in batch]
        row = pack([examples[i] for i in indices], device=base.device)
        with torch.no_grad():
            nll = base.token_nll(row, routes=routes_to(adapter))
        totals = [part.double().sum() for part in nll.split(row.num_targets)]
        sums |= zip(indices, torch.stack(totals).tolist(), strict=True)
        progress(len(indices))
    for index, value in sums.items():
        if not math.isfinite(value):
            who = f"adapter '{adapter}'" if adapter else "the untuned base"
            row_number = examples[index].record.row
            raise NonFiniteError(f"validation: the loss of {who} is {value} on record {row_number}")
    return [ExampleScore(examples[i].num_targets, sums[i]) for i in range(len(examples))]


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
    batch_size: int,
    progress: Progress = lambda _: None,
) -> list[Answer]:
    """Returns the greedy answer to each prompt, in order.

    Prompts are decoded in batches of like length, padded on the left, in an order that depends on
    their lengths only, so base and tuned model see the same batches.

    Args:
        base: The frozen model.
        prompts: Token ids of each prompt.
        adapter: Adapter name; None: the untuned base.
        max_new_tokens: Tokens per answer.
        batch_size: Prompts decoded together.
        progress: Called after each batch.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    with base.generating(routes_to(adapter)):
        for indices in _chunks(by_length, size=batch_size):
            found = _decode(base, [prompts[i] for i in indices], max_new_tokens=max_new_tokens)
            answers |= zip(indices, found, strict=True)
            progress(len(indices))
    return [answers[i] for i in range(len(prompts))]


def _chunks(items: Sequence[int], *, size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _decode(
    base: FrozenBase, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[Answer]:
    """Returns the answers of one batch: greedy, with a cache, padding masked by position."""
    width = max(len(prompt) for prompt in prompts)
    eos = base.tokenizer.eos_token_id
    ids = torch.full((len(prompts), width), eos, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    out = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        generation_config=greedy(base, max_new_tokens=max_new_tokens),
    )
    return [_answer(base, new.tolist(), eos=eos) for new in out[:, width:]]


def _answer(base: FrozenBase, new: list[int], *, eos: int) -> Answer:
    ended = eos in new
    kept = new[: new.index(eos)] if ended else new
    return Answer(base.tokenizer.decode(kept, skip_special_tokens=True), hit_limit=not ended)


def greedy(base: FrozenBase, *, max_new_tokens: int, min_new_tokens: int = 0) -> object:
    """Returns a Transformers generation config for greedy decoding and nothing else.

    The model's own generation config is not used: some ship sampling settings that contradict
    greedy decoding (transformers#29665).
    """
    from transformers import GenerationConfig

    eos = base.tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos,
        pad_token_id=eos,
        bos_token_id=base.tokenizer.bos_token_id,
    )


def score_answers(answers: Sequence[Answer], *, references: Sequence[str]) -> TextScore:
    """Returns corpus BLEU and chrF of the answers, one reference each.

    Source: Post 2018 arXiv:1804.08771; Popović 2015 (chrF), as sacreBLEU computes them.
    """
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
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
    )
