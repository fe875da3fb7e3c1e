"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loracle.errors import LoracleError
from loracle.records.result import RunResult


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    out: Path
    """Its folder."""
    result: RunResult | None
    """None if it has none."""
    error: LoracleError | None = None
    """Why it failed; None if it completed."""
    skipped: bool = False
    """It had completed before."""
