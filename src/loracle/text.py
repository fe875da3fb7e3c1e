"""Formats counts, durations and names for people; the byte unit."""

from __future__ import annotations

import re

GIB = 2**30
"""Bytes."""

# assumed: with more digits before the point than this, nobody reads the decimals
_LARGE = 1e9


def plural(number: int, word: str) -> str:
    """Returns ``1 seed`` or ``3 seeds``."""
    return f"{number:,} {word if number == 1 else word + 's'}"


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
