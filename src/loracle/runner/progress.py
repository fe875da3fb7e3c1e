"""Progress of runs as a person sees it: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from loracle.screen import screen
from loracle.text import one_line

# assumed: often enough to see that it lives, seldom enough for a log file
_LINE_EVERY_S = 15.0

Advance = Callable[..., None]
"""``advance(count, detail="...")``: ``count`` more items are done."""


class Progress:
    """Progress bars and notices of one or many runs on one console.

    Args:
        console: Defaults to standard error.
        above: Returns what is drawn above the bar on a terminal, called several times a second.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        above: Callable[[], RenderableType] | None = None,
    ) -> None:
        self.console = console or screen(stderr=True)
        self._above = above

    def notice(self, text: str) -> None:
        """Prints one line."""
        self.console.print(
            one_line(text), markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    @contextmanager
    def phase(self, title: str, *, total: int, done: int = 0) -> Iterator[Advance]:
        """Shows a bar for ``total`` items, ``done`` of which were done before."""
        if self.console.is_terminal:
            bar = self._bar()
            task = bar.add_task(title, total=total, completed=done, detail="")
            with self._live(bar):
                yield lambda count=1, detail="": bar.update(task, advance=count, detail=detail)
            return
        lines = _Lines(self, title=title, total=total, done=done)
        yield lines.advance
        lines.close()

    def _live(self, bar: RichProgress) -> AbstractContextManager[object]:
        """Shows the bar on the terminal, below what ``above`` returns."""
        above = self._above
        if above is None:
            return bar
        return Live(
            get_renderable=lambda: Group(above(), bar.get_renderable()),
            console=self.console,
            transient=True,
        )

    def _bar(self) -> RichProgress:
        return RichProgress(
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
    """A bar for output that is not a terminal: a line every ``_LINE_EVERY_S``."""

    def __init__(self, progress: Progress, *, title: str, total: int, done: int) -> None:
        self._progress, self._title, self._total, self._done = progress, title, total, done
        self._first = done
        self._started_at = self._printed_at = time.monotonic()

    def advance(self, count: int = 1, detail: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed_at >= _LINE_EVERY_S and self._done < self._total:
            self._printed_at = now
            rate = (self._done - self._first) / (now - self._started_at)
            left = (self._total - self._done) / rate if rate else 0.0
            self._print(f"{detail}  ETA {left:.0f} s")

    def close(self) -> None:
        self._print(f"done in {time.monotonic() - self._started_at:.0f} s")

    def _print(self, detail: str) -> None:
        self._progress.notice(f"{self._title}: {self._done}/{self._total}  {detail}")
