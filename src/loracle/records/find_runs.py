"""Paths of new runs, and the runs under a folder: the one to resume, the completed ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from loracle.config.run import Config, config_digest
from loracle.errors import LoracleError, RunFolderError
from loracle.records.manifest import is_verified, require_intact
from loracle.records.names import CONFIG, LOCK, MANIFEST, RESULT, STATUS
from loracle.records.result import RunResult, read_result
from loracle.records.run_state import read_status, recorded_config

_UNFINISHED = ("running", "failed", "interrupted")


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
    """Returns the newest unfinished run under ``root`` with this configuration."""
    digest = config_digest(config)
    unfinished = (path for path in _runs(root) if _status(path) in _UNFINISHED)
    return max((p for p in unfinished if _digest(p) == digest), key=_started_at, default=None)


def completed_runs(root: Path) -> Iterator[Path]:
    """Yields the folder of every completed run under ``root``, by name.

    Raises:
        RunFolderError: If a run's status is damaged: it might be a completed one.
    """
    for path in _runs(root):
        require_intact(
            path, names=(STATUS, CONFIG), remedy="restore it, or remove the run's folder"
        )
        if read_status(path).get("status") == "completed":
            yield path


def sound_results(root: Path, *, signature: str) -> Iterator[tuple[Path, RunResult]]:
    """Yields folder and result of the completed runs of a signature whose records are sound.

    For a run that looks at others beside it: a damaged one is no reason to fail, and a report of it
    says what is wrong.
    """
    for path in _runs(root):
        if _status(path) == "completed":
            with suppress(RunFolderError):
                # Few have it, and only those are worth hashing.
                if read_result(path, verify=False).signature == signature:
                    yield path, read_result(path)


def unverified(root: Path) -> str | None:
    """Returns, in one line, how many finished runs under ``root`` nothing vouches for; or None."""
    finished = [path for path in _runs(root) if (path / RESULT).is_file()]
    without = sum(not is_verified(path) for path in finished)
    if not without:
        return None
    return (
        f"{root}: {without} of {len(finished)} runs cannot be verified: an older version wrote "
        f"them, without {MANIFEST}"
    )


def _runs(root: Path) -> Iterator[Path]:
    """Yields every run folder under ``root``; runs are not searched for further runs."""
    for folder, subfolders, files in os.walk(root):
        is_run = CONFIG in files and (STATUS in files or LOCK in files)
        if is_run or (MANIFEST in files and RESULT in files):
            subfolders.clear()
            yield Path(folder)
        subfolders.sort()


def _status(path: Path) -> str | None:
    """Returns a run's status; None if the file is damaged."""
    try:
        return read_status(path).get("status")
    except LoracleError:
        return None


def _digest(path: Path) -> str | None:
    """Returns a run's configuration digest; None if its configuration is no longer valid."""
    try:
        return config_digest(recorded_config(path))
    except LoracleError:
        return None


def _started_at(path: Path) -> tuple[int, str]:
    """Sort key: the lock is made when a run starts and never written again."""
    lock = path / LOCK
    marker = lock if lock.exists() else path / CONFIG
    return marker.stat().st_mtime_ns, path.name


def read_results(root: Path) -> list[RunResult]:
    """Returns the results of the finished runs in a folder, by seed, as `comparable_results`."""
    return sorted(comparable_results(root).values(), key=lambda result: result.seed)


def comparable_results(root: Path) -> dict[Path, RunResult]:
    """Returns the results of the finished runs in a folder, by run in the order of the names.

    Raises:
        RunFolderError: If there is none, or they are not one configuration in one environment.
    """
    results = {path: read_result(path) for path in completed_runs(root)}
    if not results:
        raise RunFolderError(f"{root}: no finished run in it")
    families = {without_seed(result.signature) for result in results.values()}
    if len(families) > 1:
        raise RunFolderError(
            f"{root}: its runs differ in more than the seed and do not belong in one table "
            f"({'; '.join(_unlike(sorted(families)[:2]))})"
        )
    return results


def without_seed(signature: str) -> str:
    """Returns a signature that runs of different seeds share."""
    return re.sub(r"\|seed:\d+", "", signature)


def _unlike(signatures: Sequence[str]) -> list[str]:
    a, b = (
        {key: value for key, _, value in (item.partition(":") for item in signature.split("|"))}
        for signature in signatures
    )
    return [f"{key}: {a[key]} and {b.get(key)}" for key in a if a[key] != b.get(key)]
