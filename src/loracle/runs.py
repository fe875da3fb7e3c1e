"""Finding runs: a path for a new one, the one to resume, the ones that completed, repeats."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from loracle.config import Config, config_digest
from loracle.criteria import Repeat
from loracle.durable import read_json, read_jsonl
from loracle.errors import LoracleError
from loracle.record import read_status, recorded_config


def new_run_path(root: Path, *, name: str) -> Path:
    """Returns ``root/<name>-<YYYYMMDD-HHMMSS>`` in UTC, with a number if that is taken."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    stem = f"{slug}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    path, number = root / stem, 1
    while path.exists():
        number += 1
        path = root / f"{stem}-{number}"
    return path


def find_resumable(root: Path, *, config: Config) -> Path | None:
    """Returns the newest unfinished run under ``root`` that is the run ``config`` describes."""
    wanted = config_digest(config)
    ours = [path for path in _runs(root) if _is_unfinished(path) and _digest(path) == wanted]
    return max(ours, key=_started_at, default=None)


def completed_runs(root: Path) -> Iterator[Path]:
    """Yields the folder of every completed run under ``root``, in the order of their names."""
    for path in _runs(root):
        if _status(path) == "completed":
            yield path


def repeats_of(run: Path, *, signature: str) -> list[Repeat]:
    """Returns the finished runs beside ``run`` that have its signature.

    Args:
        run: Its folder.
        signature: Of its result.
    """
    beside = (path for path in completed_runs(run.parent) if path != run)
    found = (_repeat(path, signature=signature) for path in beside)
    return [repeat for repeat in found if repeat is not None]


def _repeat(path: Path, *, signature: str) -> Repeat | None:
    """Returns what a finished run is compared by, or None if it is another run."""
    result = read_json(path / "result.json")
    if result["signature"] != signature:
        return None
    return Repeat(
        name=path.name,
        adapter_sha256=result["adapter_sha256"],
        losses=tuple(row["loss_nats_per_token"] for row in read_jsonl(path / "steps.jsonl")),
        final_loss_nats_per_token=result["quality"]["tuned"]["loss_nats_per_token"],
    )


def _runs(root: Path) -> Iterator[Path]:
    """Yields every run folder under ``root``; what is inside a run is not searched."""
    for folder, subfolders, files in os.walk(root):
        if "config.yaml" in files and ("status.json" in files or ".lock" in files):
            subfolders.clear()
            yield Path(folder)
        subfolders.sort()


def _is_unfinished(path: Path) -> bool:
    return _status(path) in ("running", "failed", "interrupted")


def _status(path: Path) -> str | None:
    """Returns a run's status; None if its file is damaged, which must not hide the other runs."""
    try:
        return read_status(path).get("status")
    except LoracleError:
        return None


def _digest(path: Path) -> str | None:
    """Returns a run's digest; None if another version's config is no longer valid."""
    try:
        return config_digest(recorded_config(path))
    except LoracleError:
        return None


def _started_at(path: Path) -> tuple[int, str]:
    """Orders runs by their start: the lock is made first and never written again."""
    lock = path / ".lock"
    marker = lock if lock.exists() else path / "config.yaml"
    return marker.stat().st_mtime_ns, path.name
