"""The one way to the terminal: whatever is printed there is shown, and nothing is obeyed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from loracle.text import inert


class _Screen(Console):
    """A console that reads no markup in strings, and prints no character that acts.

    Styles come from ``rich.text.Text`` and from tables, cursor movements from rich itself.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(inert(segment.text), segment.style)


def screen(*, stderr: bool = False, **options: Any) -> Console:
    """Returns a console on standard output, or standard error."""
    return _Screen(stderr=stderr, markup=False, emoji=False, highlight=False, **options)
