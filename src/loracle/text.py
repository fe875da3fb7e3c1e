"""Formats counts, durations and names for people; the byte unit; text that only shows itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

GIB = 2**30
"""Bytes."""

# assumed: with more digits before the point than this, nobody reads the decimals
_LARGE = 1e9
# Characters that do something instead of being shown: controls but tab and newline, overrides of
# the writing direction, invisible tags, and what no file of text or XML may hold.
_ACTIVE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff"
    "\\ufff9-\\ufffb\\ufffe\\uffff\\U000e0000-\\U000e007f]"
)


def plural(number: int, word: str) -> str:
    """Returns ``1 seed`` or ``3 seeds``."""
    return f"{number:,} {word if number == 1 else word + 's'}"


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """Returns the first names and the number of the others, e.g. ``a, b, c and 2 more``."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shortened(text: object, *, most: int = 200) -> str:
    """Returns a message of a library without its line breaks, and not longer than ``most``."""
    return " ".join(str(text).split())[:most]


def perplexity_words(perplexity: float | None) -> str:
    """Returns a perplexity with three decimals, or how large it is."""
    if perplexity is None:
        return "above 1e308"
    return f"{perplexity:,.3f}" if perplexity < _LARGE else f"{perplexity:.3e}"


def in_words(seconds: float) -> str:
    """Returns a duration, e.g. ``40 s`` or ``1 h 20 min``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


def slug_of(name: str) -> str:
    """Returns a name in the form used in file names: lower case, words joined by ``-``."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def inert(text: str) -> str:
    r"""Returns text that a terminal, a page or a figure shows and never obeys.

    A character that would act (an escape, an override of the writing direction, half a surrogate
    pair) stands as its code, e.g. ``\x1b``; tabs and newlines stay.
    """
    return _ACTIVE.sub(lambda match: _code_of(match[0]), text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Returns `inert` text without line breaks, for a message."""
    return inert(text).replace("\n", " ").replace("\t", " ")


def active_character(text: str) -> str | None:
    """Returns the code of the first character that `inert` would replace; None if there is none."""
    match = _ACTIVE.search(text)
    return f"U+{ord(match[0]):04X}" if match else None


def _code_of(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
