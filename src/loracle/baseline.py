"""One run from configuration to result: a study of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracle.config import Config
from loracle.record import recorded_config
from loracle.runner import RunSpec, run_many
from loracle.screen import Screen


def run_baseline(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    screen: Screen | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the result of one run, as ``result.json`` holds it.

    Args:
        config: The resolved configuration.
        out: The run folder; created, or continued with ``resume``.
        resume: Continue the run in ``out``; a finished one is only read.
        screen: Where progress is shown; None: standard error.
        notes: Recorded in the section ``engine`` of environment.json.

    Raises:
        UsageError: If something the user or a file gave cannot be used; nothing is left behind.
        RunFailed: If the run cannot go on or fails its audit; the folder says why.
        Interrupted: On SIGINT or SIGTERM, after a checkpoint.
    """
    if resume:
        # There must be a run to go on with.
        recorded_config(out)
    spec = RunSpec(config, out, notes=notes or {})
    (outcome,) = run_many([spec], resume=resume, screen=screen)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return outcome.result
