"""Text and numbers for LaTeX, and macros that carry results into a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "\N{GREEK SMALL LETTER BETA}": r"$\beta$",
}
_DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")
# Characters that pdfLaTeX prints without a further package.
_PRINTABLE = re.compile(r"[\x20-\x7e\xa1-\xff]")


def escape(text: str) -> str:
    """Returns ``text`` escaped for LaTeX; unprintable characters become ``U+`` and their code."""
    escaped = "".join(_escape_character(character) for character in " ".join(text.split()))
    # After the end of a row or an item these two would belong to the command before.
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped[:1] in ("[", "*") else escaped


def escape_number(text: str) -> str:
    """Returns ``text`` escaped for LaTeX, with mathematical minus signs."""
    return escape(_MINUS.sub("\N{MINUS SIGN}", text))


def _escape_character(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    return character if _PRINTABLE.match(character) else f"U+{ord(character):04X}"


def macro_name(*words: str) -> str:
    """Returns a command name of letters only, e.g. ``LossLastEight`` of ``loss`` and ``last-8``."""
    text = "".join(
        word[:1].upper() + word[1:] for part in words for word in re.split(r"\W|_", part)
    )
    spelled = re.sub(r"\d", lambda digit: _DIGITS[int(digit[0])], text)
    return re.sub(r"[^A-Za-z]", "", spelled)


def macros_of(values: Mapping[str, str]) -> str:
    r"""Returns one ``\newcommand`` per name; the values, plain text, are escaped here."""
    lines = ["% Generated from the results; written anew by every report."]
    lines += [
        f"\\newcommand{{\\{name}}}{{{escape_number(value)}}}" for name, value in values.items()
    ]
    return "\n".join(lines) + "\n"
