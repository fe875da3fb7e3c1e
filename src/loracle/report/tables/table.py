"""A table for HTML, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from loracle.report.text.latex import escape, escape_number
from loracle.report.text.markdown import markdown_paragraph, markdown_table
from loracle.report.text.numbers import typographic

Align = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
    """One column."""

    title: str
    """Heading, without the unit."""
    unit: str = ""
    """Unit, or another note in small type below the heading."""
    align: Align = "right"
    """Right for numbers, left for words."""
    share: float = 0.0
    """Share of the line width on paper, for running text; 0: as wide as the longest cell."""

    @property
    def heading(self) -> str:
        """Title and unit in one line."""
        return f"{self.title}, {self.unit}" if self.title and self.unit else self.title or self.unit

    def parts(self, cell: str) -> list[str]:
        """Returns a cell split where a line may break: before its brackets."""
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
    columns: tuple[Column, ...]
    """The first names the row."""
    rows: tuple[tuple[str, ...], ...]
    """One string per column."""
    marks: tuple[str, ...] = ()
    """CSS class of each row on the page; empty: none."""

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
        """Returns the columns of these titles."""
        indices = [n for n, column in enumerate(self.columns) if column.title in titles]
        return Table(
            name=name,
            caption=self.caption,
            columns=tuple(self.columns[n] for n in indices),
            rows=tuple(tuple(row[n] for n in indices) for row in self.rows),
            marks=self.marks,
        )


def markdown_of(table: Table) -> str:
    """Returns a table as GitHub's Markdown, its caption below."""
    lines = markdown_table(
        [column.heading for column in table.columns],
        table.rows,
        right=[column.align == "right" for column in table.columns],
    )
    return "\n".join([*lines, "", markdown_paragraph(table.caption)]) + "\n"


def latex_of(table: Table) -> str:
    """Returns a table as a LaTeX float with booktabs' rules."""
    aligns = "".join(
        f">{{\\raggedright\\arraybackslash}}p{{{column.share:g}\\linewidth}}"
        if column.share
        else column.align[0]
        for column in table.columns
    )
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
