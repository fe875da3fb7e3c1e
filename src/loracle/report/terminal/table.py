"""The one look of tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table


def borderless(*, gap: int = 1, title: str | None = None) -> Table:
    """Returns a table with a line below its head and no edges, ``gap`` blanks between columns."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        title=title,
        title_justify="left",
        title_style="bold",
    )


def add_numbers(table: Table, *headers: str) -> None:
    """Adds columns that stand right and never break."""
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
