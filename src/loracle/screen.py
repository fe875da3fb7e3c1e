"""The one way to the terminal: what is printed is shown, not obeyed; libraries are silent."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off Transformers' progress bars and the warnings of both libraries inside the block.

    Errors still come through; LoRAcle prints a progress line of its own.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
