"""Text for Markdown: nothing in it becomes markup, a link, an image, mathematics or a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loracle.text import inert

# With a backslash each of these is only itself; an underscore inside a word is so without one. What
# starts a link is below, since brackets are plain elsewhere, as in intervals.
_MARKS = re.compile(r"[\\|<>*`&~$]|(?<![^\W_])_|_(?![^\W_])")
_LINKS = re.compile(
    r"(?<=\])[(\[:]"  # [text](address), [text][name], [name]: address
    r"|(?<=\[)\^"  # [^footnote]
    r"|(?<=[A-Za-z]):(?=//)"  # an address alone is a link too
    r"|(?<=www)\.|(?<=\w)@(?=\w)"
    r"|(?<=mailto):|(?<=xmpp):",
    re.IGNORECASE,
)


def markdown_text(text: str) -> str:
    """Returns text as one line of a cell or of a sentence."""
    return _LINKS.sub(r"\\\g<0>", _MARKS.sub(r"\\\g<0>", _plain(text)))


def markdown_paragraph(text: str) -> str:
    """Returns text as a paragraph of its own."""
    line = markdown_text(text)
    if re.match(r"[#+=-]", line):
        return "\\" + line
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", line)


def markdown_code(text: str) -> str:
    """Returns text as code in a line."""
    plain = _plain(text)
    runs = [len(run) for run in re.findall("`+", plain)]
    fence = "`" * next(n for n in range(1, len(runs) + 2) if n not in runs)
    edge = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{edge}{plain}{edge}{fence}"


def _plain(text: str) -> str:
    return " ".join(inert(text).split())


def markdown_table(
    heads: Iterable[str], rows: Iterable[Iterable[str]], *, right: Sequence[bool]
) -> list[str]:
    """Returns the lines of a table; ``right`` says which columns stand right."""
    return [
        _row(heads),
        "|" + "|".join("---:" if is_right else "---" for is_right in right) + "|",
        *map(_row, rows),
    ]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(markdown_text, cells)) + " |"
