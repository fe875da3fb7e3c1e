"""Which tokens of a packed row go through which adapter."""

from __future__ import annotations

from dataclasses import dataclass

from loracle.model.dropout import DropoutStream


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
    """Names the masks; None: no dropout."""
