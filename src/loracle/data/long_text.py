"""The first tokens of a very long text, without tokenising all of it.

Only those can matter that fit ``data.max_tokens``. They must be the very tokens that the whole text
begins with, and a tokenizer may look ahead. So a piece is believed only where that is certain:

- behind the last wanted token, the tokenizer found several more words (its own pieces, between
  which no token lies) and the text changes its kind (letters, digits, spaces, signs) several times,
  so that no word before the end of the piece depends on what follows it; or
- the piece ends before a space at which no entry of the vocabulary could lie across, so that
  merges, or pieces, on one side cannot depend on the other.

Elsewhere, as in ten million equal letters, the whole text is tokenised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# assumed: shorter texts are tokenised whole at little cost
LONG_CHARS = 100_000
# assumed: more characters than nearly every token has
_CHARS_PER_TOKEN = 16
_LEAST_CHARS = 32_768
# assumed: what a pre-tokenizer looks ahead is at most the word after, or the rest of a run
_WORDS_AFTER = 3
_RUNS_AFTER = 4

_RUN = re.compile(r"\s+|\d+|[^\W\d_]+|[^\w\s]+|_+")
_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
# A space within a token of a vocabulary that marks words by their leading space.
_INNER_SPACE = re.compile("[^\u2581][\u2581 ]")

Call = Callable[[str], "BatchEncoding"]


def first_ids(
    text: str, *, most: int, call: Call, tokenizer: PreTrainedTokenizerBase
) -> Sequence[int] | None:
    """Returns at least the first ``most`` ids of a text, or None if it must be tokenised whole.

    Args:
        text: A long text.
        most: How many ids are wanted.
        call: Tokenises one text.
        tokenizer: Whose vocabulary it is.
    """
    size = max(_LEAST_CHARS, _CHARS_PER_TOKEN * most)
    by_spaces: bool | None = None
    while 2 * size < len(text):
        piece = text[:size]
        encoded = call(piece)
        if not encoded.is_fast:
            return None
        if _is_certain(encoded, piece, most=most):
            return list(encoded["input_ids"])[:most]
        if by_spaces is None:
            by_spaces = _words_begin_with_spaces(tokenizer)
        if by_spaces and (ids := _ids_to_a_space(piece, call=call)) and len(ids) >= most:
            return ids
        size *= 2
    return None


def _is_certain(encoded: BatchEncoding, piece: str, *, most: int) -> bool:
    encoding = encoded.encodings[0]
    if len(encoding.ids) <= most:
        return False
    last, end = encoding.word_ids[most - 1], encoding.word_ids[-1]
    if last is None or end is None or end - last < _WORDS_AFTER:
        return False
    rest = piece[encoding.offsets[most - 1][1] :]
    return sum(1 for _ in _RUN.finditer(rest)) >= _RUNS_AFTER


def _words_begin_with_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns True if a space is an entry of the vocabulary that stands first in every other."""
    words = tokenizer.get_vocab()
    return "\u2581" in words and not any(_INNER_SPACE.search(word) for word in words)


def _ids_to_a_space(piece: str, *, call: Call) -> Sequence[int] | None:
    cuts = [found.start() for found in _CUT.finditer(piece, len(piece) // 2)]
    return list(call(piece[: cuts[-1]])["input_ids"]) if cuts else None
