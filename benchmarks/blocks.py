"""Blocks of a benchmark: each runs once, in its own process, and is logged in one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from figures import Row, append_line, read_lines


def run_once(spec: Row, *, script: str, log: Path, limit_s: float | None = None) -> Row | None:
    """Runs ``script --worker SPEC`` unless it is logged; returns the new row, or None.

    The last line that the worker prints is its result, as JSON. A failed block is logged too, with
    its exit status, since a setting that does not work here is a result.

    Args:
        spec: Everything that distinguishes this block, as plain data. A worker must report the
            same ``sources`` digest, so that the figures of a table are of the same code.
        script: The benchmark.
        log: JSONL file.
        limit_s: Seconds after which the block is given up, as a failure.
    """
    if any(row["spec"] == spec for row in read_lines(log)):
        return None
    command = [sys.executable, script, "--worker", json.dumps(spec)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    try:
        worker = subprocess.run(
            command, env=offline, stdout=subprocess.PIPE, text=True, check=False, timeout=limit_s
        )
        error = f"exit status {worker.returncode}" if worker.returncode else None
    except subprocess.TimeoutExpired:
        error = f"not done in {limit_s:.0f} s"
    failed = {"error": error, "rows": [], "peak_gib": None}
    result = failed if error else json.loads(worker.stdout.splitlines()[-1])
    if result.get("sources", spec.get("sources")) != spec.get("sources"):
        raise SystemExit("the sources changed while the benchmark ran; start it again")
    ended_at = datetime.now(UTC).isoformat(timespec="seconds")
    row = {"spec": spec, "ended_at": ended_at, **result}
    append_line(log, row)
    return row


def logged(log: Path, specs: list[Row]) -> list[Row]:
    """Returns the logged rows of these blocks, in their order, without missing ones."""
    rows = read_lines(log)
    return [row for spec in specs for row in rows if row["spec"] == spec]
