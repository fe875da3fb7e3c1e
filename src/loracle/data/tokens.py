"""Records as token ids: prompt, response, EOS; only the response and EOS are targets.

Prompt and response are tokenised separately and concatenated, so the boundary between them is a
count and never searched for in text. Which tokens are targets follows from position alone: a pad
token that shares its id with EOS masks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loracle.data.literal import Part, encode_texts
from loracle.data.prompt import Template
from loracle.data.records import Record
from loracle.data.rows import Drop
from loracle.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts of which nearly every tokenizer knows one.
_PROBES = ("a", "0", ".", "\n", "\u4e00", "\u3042", "\u0430", "\u0627")


@dataclass(frozen=True)
class Example:
    """The tokens of a record, within the limit; the last is EOS."""

    record: Record
    """The tokenised record."""
    input_ids: tuple[int, ...]
    """Prompt, response and EOS."""
    num_prompt: int
    """Tokens of the prompt, at least 1; every later token is a target."""
    truncated: bool
    """True if the tail of the response was cut."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt, response and EOS."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Predicted tokens: those of the response and EOS, at least 2."""
        return len(self.input_ids) - self.num_prompt


@dataclass(frozen=True)
class EncodedRecord:
    """The tokens of a record before any limit, without EOS."""

    record: Record
    """The tokenised record."""
    prompt: tuple[int, ...]
    """Prompt, with the tokenizer's own leading tokens."""
    response: tuple[int, ...]
    """Response, without special tokens."""


def end_ids_of(
    tokenizer: PreTrainedTokenizerBase, *, named: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    """Returns the ids of the tokens that end an answer; the first is the one to learn.

    That is the tokenizer's EOS, unless the model names other added tokens and not this one: then
    the first of those. An answer ends with any of them. Empty if there is none.

    Args:
        tokenizer: The model's tokenizer.
        named: ``eos_token_id`` of the model's generation config.
    """
    own = tokenizer.eos_token_id
    ends = [named] if isinstance(named, int) else list(named or ())
    other = next((end for end in ends if end in tokenizer.added_tokens_decoder), None)
    first = other if own is None or (own not in ends and other is not None) else own
    return tuple(end for end in dict.fromkeys((first, *ends, own)) if end is not None)


def eos_id_of(tokenizer: PreTrainedTokenizerBase, *, end_ids: Sequence[int] = ()) -> int:
    """Returns the id of the token that ends a response.

    Args:
        tokenizer: The model's tokenizer.
        end_ids: What the model ends answers with, as ``FrozenBase.end_ids``.

    Raises:
        ModelError: If there is none; a model trained without one never stops.
    """
    ends = (*end_ids, *end_ids_of(tokenizer))
    if not ends:
        raise ModelError(
            "the model's tokenizer has no EOS token, so responses could not end; "
            "set eos_token in its tokenizer_config.json"
        )
    return int(ends[0])


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids that the tokenizer prepends to a text: BOS for Llama, none for SmolLM2.

    Found by tokenising a probe with and without special tokens, because neither ``bos_token`` (may
    be set and unused) nor ``add_bos_token`` (may be absent) decides it.
    """
    for probe in _PROBES:
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if bare:
            full = tokenizer(probe)["input_ids"]
            starts = (k for k in range(len(full)) if full[k : k + len(bare)] == bare)
            return tuple(full[: next(starts, 0)])
    return ()


def encode_prompts(
    records: Sequence[Record],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
) -> list[tuple[int, ...]]:
    """Returns the ids of each record's prompt: the tokenizer's leading tokens and the text, no EOS.

    Special tokens in a template (``<|im_start|>``) are encoded as such, in a record as plain text.
    A template that begins with the tokenizer's leading token replaces it: BOS stands once. Very
    long prompts may be cut behind ``most`` ids.
    """
    leading = leading_ids(tokenizer)
    texts = [template.parts(record) for record in records]
    return [
        ids if leading and ids[:1] == leading[:1] else leading + ids
        for ids in encode_texts(texts, tokenizer=tokenizer, most=most)
    ]


def encode_records(
    records: Sequence[Record],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
) -> list[EncodedRecord]:
    """Returns the tokens of each record.

    A response is encoded as plain text: ``</s>`` in it yields its letters, so that EOS only ends
    the sequence. Very long texts may be cut behind ``most`` ids, which is as good as whole for a
    limit of ``most`` tokens an example.
    """
    prompts = encode_prompts(records, template=template, tokenizer=tokenizer, most=most)
    outputs = [[Part(record.output, from_record=True)] for record in records]
    responses = encode_texts(outputs, tokenizer=tokenizer, most=most)
    return [EncodedRecord(*parts) for parts in zip(records, prompts, responses, strict=True)]


def truncate(encoded: EncodedRecord, *, max_tokens: int, eos_id: int) -> Example | Drop:
    """Returns the record as an example of at most ``max_tokens``, EOS included, or a ``Drop``.

    The tail of a long response is cut and EOS added, as it is to a response that fits: every
    example then ends alike, and a model with short limits still learns to stop. A prompt is never
    cut, because half a question with the whole answer would teach answering what was not asked. So
    a record whose prompt leaves no room for one response token and EOS is ``prompt_too_long``.
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
