"""Records as token ids: prompt, response, EOS; only the response and EOS are targets.

Prompt and response are tokenised separately and concatenated, so the boundary between them is a
count and never searched for in text. Which tokens are targets follows from position alone: a pad
token that shares its id with EOS masks nothing.
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


def eos_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the token that ends a response.

    Raises:
        ModelError: If the tokenizer has none; a model trained without one never stops.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ModelError(
            "the model's tokenizer has no EOS token, so responses could not end; "
            "set eos_token in its tokenizer_config.json"
        )
    return int(eos_id)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids that the tokenizer prepends to a text: BOS for Llama, none for SmolLM2.

    Found by tokenising a probe with and without special tokens, because neither ``bos_token`` (may
    be set and unused) nor ``add_bos_token`` (may be absent) decides it.
    """
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    starts = (k for k in range(len(full)) if full[k : k + len(bare)] == bare)
    return tuple(full[: next(starts, 0)])


def encode_prompts(
    prompts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Returns the ids of each prompt: the tokenizer's leading tokens and the text, no EOS.

    Special tokens in a template (``<|im_start|>``) are encoded as such.
    """
    leading = leading_ids(tokenizer)
    return [leading + ids for ids in _encode(prompts, tokenizer=tokenizer, plain=False)]


def encode_records(
    records: Sequence[Record], *, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[EncodedRecord]:
    """Returns the tokens of each record.

    A response is encoded as plain text: ``</s>`` in it yields its letters, so that EOS only ends
    the sequence.
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
