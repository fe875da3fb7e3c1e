"""What a caller asks of the runner, and what it gets back. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracle.config.run import Config
from loracle.errors import LoracleError
from loracle.records.result import RunResult


@dataclass(frozen=True)
class RunSpec:
    """A run to do."""

    config: Config
    """Its resolved configuration."""
    out: Path
    """Its run folder."""
    arm: str | None = None
    """Name of its placement in the results; None: the placement's label."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Recorded in the section ``engine`` of environment.json, e.g. how settings were chosen."""
    beside: Sequence[Path] = ()
    """Folders of runs done before whose results decided about this one: same base, same data."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: with a result or with an error."""

    out: Path
    """Its run folder."""
    result: RunResult | None
    """None if it has none."""
    error: LoracleError | None = None
    """Why it failed; None if it completed."""
