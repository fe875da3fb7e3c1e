"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.errors import LoracleError


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    out: Path
    """Its folder."""
    result: dict[str, Any] | None
    """As ``result.json`` holds it; None if it has none."""
    error: LoracleError | None = None
    """Why it failed; None if it completed."""
    skipped: bool = False
    """It had completed before."""
