"""A table once, as HTML, Markdown and LaTeX show it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from loracle.report.text.latex import escape, escape_number
from loracle.report.text.numbers import typographic

Align = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
    """One column."""

    title: str
    """Its heading, without the unit."""
    unit: str = ""
    """Unit, or whatever else stands small below the heading."""
    align: Align = "right"
    """Numbers stand right, words left."""
    share: float = 0.0
    """Of the width of a line on paper, for running text; 0: as wide as its longest cell."""

    @property
    def heading(self) -> str:
        """Title and unit in one line."""
        return f"{self.title}, {self.unit}" if self.title and self.unit else self.title or self.unit

    def parts(self, cell: str) -> list[str]:
        """Returns a cell in the parts between which a line may break: before its brackets."""
        if self.align == "left":
            return [cell]
        at = min((k for k in (cell.find(" ["), cell.find(" (")) if k > 0), default=len(cell))
        return [part for part in (cell[:at], cell[at + 1 :]) if part]


@dataclass(frozen=True)
class Table:
    """Rows of text under typed columns."""

    name: str
    """Stem of its files, and its anchor."""
    caption: str
    """What it shows, with n and where it was measured."""
    columns: tuple[Column, ...]
    """From left to right; the first names the row."""
    rows: tuple[tuple[str, ...], ...]
    """One string per column."""
    marks: tuple[str, ...] = ()
    """Per row a word by which a page may set it apart; empty: none."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    def cells(self) -> Iterator[tuple[str, list[tuple[Column, str]]]]:
        """Yields each row's mark and its cells, numbers with a real minus sign."""
        marks = self.marks or ("",) * len(self.rows)
        for mark, row in zip(marks, self.rows, strict=True):
            yield (
                mark,
                [
                    (column, typographic(cell) if column.align == "right" else cell)
                    for column, cell in zip(self.columns, row, strict=True)
                ],
            )

    def only(self, *titles: str, name: str) -> Table:
        """Returns the same rows with the columns of these titles."""
        kept = [n for n, column in enumerate(self.columns) if column.title in titles]
        return Table(
            name=name,
            caption=self.caption,
            columns=tuple(self.columns[n] for n in kept),
            rows=tuple(tuple(row[n] for n in kept) for row in self.rows),
            marks=self.marks,
        )


def markdown_of(table: Table) -> str:
    """Returns a table as GitHub's Markdown, its caption below."""
    rules = ["---:" if column.align == "right" else "---" for column in table.columns]
    lines = [
        _markdown_row(column.heading for column in table.columns),
        "|" + "|".join(rules) + "|",
        *(_markdown_row(row) for row in table.rows),
        "",
        _markdown_text(table.caption),
    ]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_markdown_text(cell) for cell in cells) + " |"


def _markdown_text(text: str) -> str:
    plain = " ".join(text.split())
    for mark in "\\|<>*_`":
        plain = plain.replace(mark, "\\" + mark)
    return plain


def latex_of(table: Table) -> str:
    """Returns a table as a LaTeX float with booktabs' rules."""
    aligns = "".join(_latex_align(column) for column in table.columns)
    heads = [_latex_row(escape(column.title) for column in table.columns)]
    if any(column.unit for column in table.columns):
        heads.append(_latex_row(escape(column.unit) for column in table.columns))
    lines = [
        "\\begin{table}[tbp]",
        "\\centering\\footnotesize\\setlength{\\tabcolsep}{3.5pt}",
        f"\\caption{{{escape(table.caption)}}}",
        f"\\label{{tab:{table.name}}}",
        # A table that is wider than the line shrinks to it; others stay as they are.
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{@{{}}{aligns}@{{}}}}",
        "\\toprule",
        *heads,
        "\\midrule",
        *(_latex_cells(table, row) for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cells(table: Table, row: tuple[str, ...]) -> str:
    return _latex_row(
        escape_number(cell) if column.align == "right" else escape(cell)
        for column, cell in zip(table.columns, row, strict=True)
    )


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"


def _latex_align(column: Column) -> str:
    if column.share:
        return f">{{\\raggedright\\arraybackslash}}p{{{column.share:g}\\linewidth}}"
    return "r" if column.align == "right" else "l"
