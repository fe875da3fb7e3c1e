"""The number formats of reports; ``n/a`` for a value that was not measured.

Signs are ASCII; each output format sets its own minus (`typographic`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

NOT_MEASURED = "n/a"

LOSS_DECIMALS = 4
PERCENT_DECIMALS = 2
BLEU_DECIMALS = 2

_MINUS = re.compile(r"(?<![\w.])-(?=\d)")
_SMALLEST_P = 0.001


def fixed(value: float | None, *, decimals: int) -> str:
    """Returns a value with thousands separators."""
    return NOT_MEASURED if value is None else f"{_rounded(value, decimals):,.{decimals}f}"


def signed(value: float | None, *, decimals: int) -> str:
    """Returns a difference with its sign; without one if it rounds to zero."""
    if value is None:
        return NOT_MEASURED
    rounded = _rounded(value, decimals)
    return f"{rounded:{'+' if rounded else ''},.{decimals}f}"


def interval(low: float | None, high: float | None, *, decimals: int) -> str:
    """Returns ``[low, high]`` with signs."""
    if low is None or high is None:
        return NOT_MEASURED
    return f"[{signed(low, decimals=decimals)}, {signed(high, decimals=decimals)}]"


def interval_words(coverage: float) -> str:
    """Returns ``95 % interval``."""
    return f"{100 * coverage:g} % interval"


def with_interval(
    value: float | None, low: float | None, high: float | None, *, decimals: int
) -> str:
    """Returns a difference and its interval, or ``(no interval)``."""
    if value is None:
        return NOT_MEASURED
    shown = signed(value, decimals=decimals)
    if low is None or high is None:
        return f"{shown} (no interval)"
    return f"{shown} {interval(low, high, decimals=decimals)}"


def p_value(value: float | None) -> str:
    """Returns a p-value with three decimals, or ``< 0.001``."""
    if value is None:
        return NOT_MEASURED
    return f"< {_SMALLEST_P}" if value < _SMALLEST_P else f"{value:.3f}"


def count(value: float | None) -> str:
    """Returns a whole number with thousands separators."""
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def percent(frac: float | None, *, decimals: int = 1, sign: bool = False) -> str:
    """Returns a fraction in percent."""
    if frac is None:
        return NOT_MEASURED
    show = signed if sign else fixed
    return f"{show(100 * frac, decimals=decimals)} %"


def decimals_for(values: Iterable[float | None], *, significant: int = 3) -> int:
    """Returns the decimals that show ``significant`` digits of the smallest value."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 2
    return min(6, max(0, significant - 1 - math.floor(math.log10(min(sizes)))))


def typographic(text: str) -> str:
    """Returns ``text`` with a real minus sign before each negative number."""
    return _MINUS.sub("\N{MINUS SIGN}", text)


def _rounded(value: float, decimals: int) -> float:
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    return round(value, decimals) + 0.0
