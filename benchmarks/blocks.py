"""Blocks of a benchmark: each a process of its own, each done once, all of them in one log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from figures import append_line, read_lines

Row = dict[str, Any]


def run_once(spec: Mapping[str, Any], *, script: str, log: Path) -> Row | None:
    """Runs ``script --worker SPEC`` unless the log has it already; returns the row it logged.

    The worker prints its result as one line of JSON, the last. A block that fails is logged too,
    with the exit status: a setting that does not work here is a result.

    Args:
        spec: Everything that tells this block from others, as plain data. With a ``sources``
            digest, the worker must report the same one: figures of one table are of one code.
        script: The benchmark.
        log: JSONL file.

    Returns:
        The row; None if it was there before.
    """
    if any(row["spec"] == spec for row in read_lines(log)):
        return None
    command = [sys.executable, script, "--worker", json.dumps(spec)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, env=offline, stdout=subprocess.PIPE, text=True, check=False)
    failed = {"error": f"exit status {done.returncode}", "rows": [], "peak_gib": None}
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed
    if result.get("sources", spec.get("sources")) != spec.get("sources"):
        raise SystemExit("the sources changed while the benchmark ran; start it again")
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    row = {"spec": dict(spec), "ended_at": ended, **result}
    append_line(log, row)
    return row


def logged(log: Path, specs: list[Row]) -> list[Row]:
    """Returns the logged rows of these blocks, in their order; what is missing is left out."""
    rows = read_lines(log)
    return [row for spec in specs for row in rows if row["spec"] == spec]
