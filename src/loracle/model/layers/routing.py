"""Which tokens of a packed row go through which adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from loracle.errors import ModelError
from loracle.model.layers.dropout import DropoutStream


@dataclass(frozen=True)
class Route:
    """Which tokens of the row, or sequences of a batch, go through which adapter."""

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
    units: int | None = None
    """How many of what the routes count there are: tokens, or sequences while decoding."""

    @contextmanager
    def following(self, routes: Sequence[Route], *, units: int | None = None) -> Iterator[None]:
        """Sends every forward pass inside the block along ``routes``.

        ``units`` is how many tokens, or sequences, they count; None: as many as a layer has rows.
        """
        before, self.routes, self.units = (self.routes, self.units), tuple(routes), units
        try:
            yield
        finally:
            self.routes, self.units = before

    def routes_of(self, shape: Sequence[int], *, module: str) -> tuple[Route, ...] | None:
        """Returns the routes over the rows of a layer whose input has this shape.

        A layer may see several rows of each unit: the tokens of a sequence, or all that are cached.

        Raises:
            ModelError: If its rows are not those of the units, as in an expert that sees some.
        """
        rows = math.prod(shape[:-1])
        if not self.routes or self.units is None or rows == self.units:
            return self.routes
        if all(not route.start and route.stop in (None, self.units) for route in self.routes):
            return tuple(replace(route, stop=None) for route in self.routes)
        each, left = divmod(rows, self.units)
        if left or (len(shape) != 2 and shape[0] != self.units):
            raise ModelError(
                f"{module}: sees {rows} rows of a pass over {self.units}, so that adapters on it "
                "would be mixed up; leave it out of lora.placement"
            )
        return tuple(
            replace(route, start=route.start * each, stop=route.stop and route.stop * each)
            for route in self.routes
        )
