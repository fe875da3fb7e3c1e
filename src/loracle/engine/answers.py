"""Greedy answers of a base and its adapters, and their scores against the records' responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracle.config.bleu import DEFAULT, bleu_metric
from loracle.engine.decode import (
    CACHE_TOKENS,
    decode_greedily,
    decodes_exactly,
    generate_greedily,
    prompt_batches,
)
from loracle.engine.evaluate import Progress
from loracle.model.base import FrozenBase


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
