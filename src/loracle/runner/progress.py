"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# assumed: often enough to see that it lives, seldom enough for a log file
_LINE_EVERY_S = 15.0

Advance = Callable[..., None]
"""``advance(count, detail="...")``: so many more are done."""


class Screen:
    """Progress and notices of one run, or of many, on one console.

    Args:
        console: Where it is shown; None: standard error.
        above: Returns what stands above the bar on a terminal, asked anew several times a second;
            None: nothing.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        above: Callable[[], RenderableType] | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self._above = above

    def notice(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, title: str, *, total: int, done: int = 0) -> Iterator[Advance]:
        """Shows a bar for ``total`` items, ``done`` of which were done before."""
        if self.console.is_terminal:
            bar = self._bar()
            task = bar.add_task(title, total=total, completed=done, detail="")
            with self._shown(bar):
                yield lambda count=1, detail="": bar.update(task, advance=count, detail=detail)
            return
        lines = _Lines(self, title=title, total=total, done=done)
        yield lines.advance
        lines.close()

    def _shown(self, bar: Progress) -> AbstractContextManager[object]:
        """Returns a block in which the bar is on the terminal, with what stands above it."""
        above = self._above
        if above is None:
            return bar
        return Live(
            get_renderable=lambda: Group(above(), bar.get_renderable()),
            console=self.console,
            transient=True,
        )

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
        )


class _Lines:
    """A bar for places without a terminal: a line now and then."""

    def __init__(self, screen: Screen, *, title: str, total: int, done: int) -> None:
        self._screen, self._title, self._total, self._done = screen, title, total, done
        self._first = done
        self._began = self._printed = time.monotonic()

    def advance(self, count: int = 1, detail: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed >= _LINE_EVERY_S and self._done < self._total:
            self._printed = now
            rate = (self._done - self._first) / (now - self._began)
            left = (self._total - self._done) / rate if rate else 0.0
            self._print(f"{detail}  ETA {left:.0f} s")

    def close(self) -> None:
        self._print(f"done in {time.monotonic() - self._began:.0f} s")

    def _print(self, detail: str) -> None:
        self._screen.notice(f"{self._title}: {self._done}/{self._total}  {detail}")
