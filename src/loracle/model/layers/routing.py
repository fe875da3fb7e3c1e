"""Which tokens of a packed row go through which adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from loracle.model.layers.dropout import DropoutStream


@dataclass(frozen=True)
class Route:
    """Which tokens of the row go through which adapter."""

    adapter: str
    """Adapter name in PEFT."""
    start: int = 0
    """First token."""
    stop: int | None = None
    """One past the last token; None: the end of the row."""
    dropout: DropoutStream | None = None
    """Identifies the masks; None: no dropout."""


@dataclass
class Router:
    """Holds the routes of the current pass for all adapted layers of one base."""

    routes: tuple[Route, ...] | None = field(default=None)
    """None: PEFT's own forward. Empty: the base alone."""

    @contextmanager
    def following(self, routes: Sequence[Route]) -> Iterator[None]:
        """Sends every forward pass inside the block along ``routes``."""
        before, self.routes = self.routes, tuple(routes)
        try:
            yield
        finally:
            self.routes = before
