"""Texts as token ids: a template's special tokens are special, those that a record spells are text.

A text is a list of parts, some written by a template and some by a record. Nearly every text holds
special tokens in the template's parts alone, or none, and is encoded as stock Transformers does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from loracle.data.long_text import LONG_CHARS, first_ids

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# Texts per tokenizer call: enough to fill its threads, few enough that the offsets and masks it
# also returns stay small. Assumed.
_CHUNK = 256
# A private-use character: a token that is put before a text which does not stand first.
_ANCHOR = "\U000f4a17"

Ids = tuple[int, ...]


class Part(NamedTuple):
    """A piece of a text, and whose it is."""

    text: str
    from_record: bool
    """True: special tokens in it are plain text."""


def encode_texts(
    texts: Sequence[Sequence[Part]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
) -> Iterator[Ids]:
    """Yields the ids of each text, without the tokenizer's own leading or closing tokens.

    Args:
        texts: The parts of each text.
        tokenizer: The model's tokenizer.
        most: How many ids of a text matter; a very long one may yield as few. None: all.
    """
    encoder = _Encoder(tokenizer, _special_pattern(tokenizer), most)
    # Equal ids share one int object: tens of bytes less per token.
    shared: dict[int, int] = {}
    for start in range(0, len(texts), _CHUNK):
        for ids in encoder.encode(texts[start : start + _CHUNK]):
            yield tuple(map(shared.setdefault, ids, ids))


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Returns a pattern of every special token, longest first; without any, one of nothing."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    longest_first = sorted(filter(None, names), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@dataclass
class _Encoder:
    """A tokenizer with its special tokens, and how many ids of a text matter."""

    tokenizer: PreTrainedTokenizerBase
    special: re.Pattern[str]
    most: int | None

    def encode(self, texts: Sequence[Sequence[Part]]) -> list[Sequence[int]]:
        """Returns the ids of each text, of most of them together."""
        whole = ["".join(part.text for part in parts) for parts in texts]
        encoded: dict[int, Sequence[int]] = {}
        stock, plain = [], []
        for index, parts in enumerate(texts):
            written, found = self._num_special(parts, whole[index])
            if found == written:
                stock.append(index)
            elif written == 0:
                plain.append(index)
            else:
                encoded[index] = self._encode_mixed(parts)
        for indices, split in ((stock, False), (plain, True)):
            chosen = [whole[index] for index in indices]
            encoded |= zip(indices, self._encode_whole(chosen, split=split), strict=True)
        return [encoded[index] for index in range(len(texts))]

    def _num_special(self, parts: Sequence[Part], whole: str) -> tuple[int, int]:
        """Returns the special tokens that the template writes, and those in the text as a whole.

        They differ too where a template and a record spell one together.
        """
        found = len(self.special.findall(whole))
        if not found:
            return 0, 0
        written = (part.text for part in parts if not part.from_record)
        return sum(len(self.special.findall(text)) for text in written), found

    def _encode_whole(self, texts: Sequence[str], *, split: bool) -> Iterator[Sequence[int]]:
        """Yields the ids of each text: of short ones together, of a long one as they matter."""
        call = partial(_call, self.tokenizer, split=split)
        for is_long, group in groupby(texts, key=lambda text: len(text) > LONG_CHARS):
            if not is_long:
                yield from call(list(group))["input_ids"]
                continue
            for text in group:
                ids = None
                if self.most is not None:
                    ids = first_ids(text, most=self.most, call=call, tokenizer=self.tokenizer)
                yield call(text)["input_ids"] if ids is None else ids

    def _encode_mixed(self, parts: Sequence[Part]) -> list[int]:
        """Returns the ids of a text in which both template and record spell special tokens.

        The text between two special tokens of the template is encoded as plain text, as one that
        does not stand first; white space beside a special token goes where that token swallows it.
        """
        ids: list[int] = []
        tokens = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        before = None
        for name, text in _between(parts, self.special):
            left, right = tokens.get(before or ""), tokens.get(name or "")
            text = text.lstrip() if left is not None and left.rstrip else text
            text = text.rstrip() if right is not None and right.lstrip else text
            if text:
                ids += self._encode_plain(text, first=not ids)
            if name is not None:
                ids.append(self.tokenizer.convert_tokens_to_ids(name))
            before = name
        return ids

    def _encode_plain(self, text: str, *, first: bool) -> Sequence[int]:
        """Returns the ids of a plain text that stands first, or follows another token.

        Some tokenizers put a space before what stands first, so others stand behind an anchor.
        """
        if not first:
            anchor = self._anchored.convert_tokens_to_ids(_ANCHOR)
            ids: Sequence[int] = _call(self._anchored, _ANCHOR + text, split=True)["input_ids"]
            if ids[0] == anchor:
                return ids[1:]
        plain: Sequence[int] = _call(self.tokenizer, text, split=True)["input_ids"]
        return plain

    @cached_property
    def _anchored(self) -> PreTrainedTokenizerBase:
        return _with_anchor(self.tokenizer)


def _call(
    tokenizer: PreTrainedTokenizerBase, texts: str | list[str], *, split: bool
) -> BatchEncoding:
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=split,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def _between(parts: Iterable[Part], special: re.Pattern[str]) -> Iterator[tuple[str | None, str]]:
    """Yields the template's special tokens, each with the text before it; None: the end."""
    text = ""
    for part in parts:
        if part.from_record:
            text += part.text
            continue
        end = 0
        for found in special.finditer(part.text):
            yield found[0], text + part.text[end : found.start()]
            text, end = "", found.end()
        text += part.text[end:]
    yield None, text


def _with_anchor(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    from transformers import AddedToken

    anchored = copy.deepcopy(tokenizer)
    anchored.add_tokens([AddedToken(_ANCHOR, normalized=False, special=False)])
    return anchored
