"""Records as token ids: prompt, response, EOS; only the response and EOS are targets.

Prompt and response are tokenised apart and laid end to end, so the boundary between them is a
count, never something searched for in text. Which tokens are targets follows from position alone: a
pad token that shares its id with EOS masks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loracle.data.prompt import Template
from loracle.data.records import Record
from loracle.data.rows import Drop
from loracle.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts per tokenizer call: enough to fill its threads, few enough that the offsets and masks it
# also returns stay small. Assumed.
_CHUNK = 1024


@dataclass(frozen=True)
class Example:
    """The tokens of a record, within the limit; the last is EOS."""

    record: Record
    """Where they come from."""
    input_ids: tuple[int, ...]
    """Prompt, response and EOS."""
    num_prompt: int
    """Tokens of the prompt, at least 1; every later token is a target."""
    truncated: bool
    """True if the tail of the response was cut."""

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: the response's and EOS, at least 2."""
        return len(self.input_ids) - self.num_prompt


@dataclass(frozen=True)
class EncodedRecord:
    """The tokens of a record before any limit, EOS not yet added."""

    record: Record
    """Where they come from."""
    prompt: tuple[int, ...]
    """Prompt, with the tokenizer's own leading tokens."""
    response: tuple[int, ...]
    """Response, without special tokens."""

    @property
    def smallest_limit(self) -> int:
        """The smallest ``max_tokens`` that keeps it: room for one response token and EOS."""
        return len(self.prompt) + 2


def eos_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the token that ends a response.

    Raises:
        ModelError: If the tokenizer has none; a model trained without one would never stop.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ModelError(
            "the model's tokenizer has no EOS token, so responses could not end; "
            "set eos_token in its tokenizer_config.json"
        )
    return int(eos_id)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns what the tokenizer puts before a text: BOS for Llama, nothing for SmolLM2.

    Found by tokenising a probe with and without special tokens, because neither ``bos_token`` (may
    be set and unused) nor ``add_bos_token`` (may be absent) says what the tokenizer does.
    """
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    starts = (k for k in range(len(full)) if full[k : k + len(bare)] == bare)
    return tuple(full[: next(starts, 0)])


def encode_prompts(
    prompts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Returns the ids of each prompt: the tokenizer's own leading tokens, the text, no EOS.

    Special tokens that a template spells out (``<|im_start|>``) are read as such.
    """
    leading = leading_ids(tokenizer)
    return [leading + ids for ids in _encode(prompts, tokenizer=tokenizer, plain=False)]


def encode_records(
    records: Sequence[Record], *, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[EncodedRecord]:
    """Returns the tokens of each record, prompt and response apart.

    A response is text and nothing else: one that spells ``</s>`` yields its letters, so no EOS
    stands before the end.
    """
    prompts = encode_prompts([template.render(record) for record in records], tokenizer=tokenizer)
    outputs = [record.output for record in records]
    responses = _encode(outputs, tokenizer=tokenizer, plain=True)
    return [EncodedRecord(*parts) for parts in zip(records, prompts, responses, strict=True)]


def _encode(
    texts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase, plain: bool
) -> Iterator[tuple[int, ...]]:
    # Equal ids share one int object: tens of bytes less per token.
    shared: dict[int, int] = {}
    for start in range(0, len(texts), _CHUNK):
        batch = tokenizer(
            list(texts[start : start + _CHUNK]),
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids in batch["input_ids"]:
            yield tuple(map(shared.setdefault, ids, ids))


def fit(encoded: EncodedRecord, *, max_tokens: int, eos_id: int) -> Example | Drop:
    """Returns the record as an example of at most ``max_tokens``, or why there is none.

    The tail of a long response is cut and EOS put after what remains, as it is for a response that
    fits: every example then ends alike, the count of targets never depends on where the limit fell,
    and a model of short limits still learns to stop. A prompt is never cut: half a question with
    the whole answer would teach answering what was not asked. So a record whose prompt leaves no
    room for one token of response and EOS is ``prompt_too_long``.

    Args:
        encoded: The record's tokens.
        max_tokens: Limit on prompt, response and EOS together.
        eos_id: The id that ends every example.
    """
    record = encoded.record
    if not encoded.prompt:
        return Drop(record.row, "no_prompt_tokens")
    if not encoded.response:
        return Drop(record.row, "no_response_tokens")
    room = max_tokens - len(encoded.prompt) - 1
    if room < 1:
        return Drop(record.row, "prompt_too_long")
    return Example(
        record=record,
        input_ids=(*encoded.prompt, *encoded.response[:room], eos_id),
        num_prompt=len(encoded.prompt),
        truncated=len(encoded.response) > room,
    )
