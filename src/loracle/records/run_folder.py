"""The run folder: all files of a run, readable at any moment, also after SIGKILL.

::

    config.yaml     resolved configuration        steps.jsonl     one row per optimizer step
    status.json     running, completed, ...       evals.jsonl     one row per validation
    environment.json, data.json, modules.json, examples.jsonl, result.json, adapter/, checkpoints/

Whole files are replaced atomically. The two growing files gain one line at a time; a last line that
was cut short is dropped.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from loracle.config.files import dump_yaml, merge, parse_config, read_yaml
from loracle.config.run import Config, difference
from loracle.errors import RunFolderError
from loracle.records.files import (
    disk_faults,
    is_unsupported,
    read_json,
    read_jsonl,
    strict_json,
    to_json,
    write_durably,
    write_json,
)
from loracle.records.names import CHECKPOINTS, CONFIG, EVALS, LOCK, RESULT, STATUS, STEPS
from loracle.records.result import RunResult

Status = Literal["running", "completed", "failed", "interrupted"]

_STATUS_FIELDS = ("phase", "step", "max_steps", "error")
_PREPARING = "prepare"


class RunFolder:
    """One run's folder, held by one process at a time.

    The kernel releases the lock if the process dies. A completed run can be read and never written.

    Attributes:
        path: The folder.
        config: The run's resolved configuration.
        status: Contents of ``status.json``.
        failed_before: Whether the run had failed when it was reopened.
        has_begun: Whether anything but preparations was done since it was opened.
    """

    def __init__(self, path: Path, *, config: Config, status: dict[str, Any], lock: int) -> None:
        self.path = path
        self.config = config
        self.status = status
        self.failed_before = status.get("status") == "failed"
        self.has_begun = False
        self._status_before = status
        self._lock: int | None = lock

    @classmethod
    def create(cls, path: Path, *, config: Config) -> Self:
        """Returns a new run's folder, with ``config.yaml`` and the status "running".

        Raises:
            RunFolderError: If it holds a run or anything else, is in use or cannot be written.
        """
        with disk_faults(path):
            path.mkdir(parents=True, exist_ok=True)
            _require_vacant(path)
            lock = _acquire(path)
        try:
            # Again under the lock: another process may have created a run meanwhile.
            _require_vacant(path)
            run = cls(path, config=config, status={}, lock=lock)
            run.write_yaml(CONFIG, config.model_dump(mode="json"))
            run.set_status("running", max_steps=config.train.max_steps)
        except BaseException:
            os.close(lock)
            raise
        return run

    @classmethod
    def reopen(cls, path: Path, *, config: Config | None = None) -> Self:
        """Returns the folder of an existing run, to resume it (or to read it, if completed).

        Args:
            path: The folder.
            config: The requested configuration; None: the recorded one. Checkpointing and tracking
                may differ from the recorded one, nothing else.

        Raises:
            RunFolderError: If there is no run, it is another one, is in use or cannot be written.
        """
        recorded = recorded_config(path)
        differences = difference(recorded, config) if config else []
        if differences:
            raise RunFolderError(
                f"{path}: was started with another configuration ({'; '.join(differences)}); "
                "resume with the recorded one, or give another --out"
            )
        with disk_faults(path):
            lock = _acquire(path)
        try:
            run = cls(path, config=config or recorded, status=read_status(path), lock=lock)
            run._continue(recorded)
        except BaseException:
            os.close(lock)
            raise
        return run

    def _continue(self, recorded: Config) -> None:
        """Prepares an unfinished run for writing."""
        if self.is_finished:
            return
        for name in (STEPS, EVALS):
            self._drop_partial_line(name)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if self.config != recorded:
            self.write_yaml(CONFIG, self.config.model_dump(mode="json"))
        self.set_status("running")

    @property
    def is_finished(self) -> bool:
        """Whether the run completed; its files are then never overwritten."""
        return self.status.get("status") == "completed"

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.path / CHECKPOINTS

    def has(self, name: str) -> bool:
        """Returns whether a file of that name is in the folder."""
        return (self.path / name).exists()

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def set_status(self, status: Status, **fields: Any) -> None:
        """Replaces ``status.json``; "completed" is the last write to a run.

        Fields are ``phase``, ``step``, ``max_steps`` and ``error``; one that is not given keeps its
        value, except ``error``, which is cleared.
        """
        assert set(fields) <= set(_STATUS_FIELDS), f"no such status field in {sorted(fields)}"
        new = {
            "status": status,
            **{key: self.status.get(key) for key in _STATUS_FIELDS},
            "error": None,
            **fields,
            "updated_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self.write_json(STATUS, new)
        self.status = new
        self.has_begun |= fields.get("phase", _PREPARING) != _PREPARING

    def restore_status(self) -> None:
        """Puts ``status.json`` back to what it was before the folder was reopened.

        A run that was killed said "running"; it is "interrupted" now that somebody knows.
        """
        if self.is_finished:
            return
        before = {"status": "running"} | self._status_before
        if before["status"] == "running":
            before["status"] = "interrupted"
        self.write_json(STATUS, before)
        self.status = before

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Replaces a JSON file, as `loracle.records.files.write_json` does."""
        self._require_open(name)
        write_json(self.path / name, data)

    def write_result(self, result: RunResult) -> None:
        """Replaces ``result.json``."""
        self.write_json(RESULT, to_json(result))

    def write_yaml(self, name: str, data: Mapping[str, Any]) -> None:
        """Replaces a YAML file."""
        self._replace(name, dump_yaml(data))

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces a file of one JSON object per line."""
        lines = [strict_json(row, origin=f"{name}:{n}") + "\n" for n, row in enumerate(rows, 1)]
        self._replace(name, "".join(lines))

    def append_step(self, row: Mapping[str, Any]) -> None:
        """Adds a row to ``steps.jsonl``; it needs a ``step``."""
        self._append(STEPS, row)

    def append_eval(self, row: Mapping[str, Any]) -> None:
        """Adds a row to ``evals.jsonl``; it needs a ``step``."""
        self._append(EVALS, row)

    def rewind(self, step: int) -> None:
        """Drops the rows after ``step``, that of the loaded checkpoint; -1 drops all of them."""
        for name in (STEPS, EVALS):
            rows = self.read_jsonl(name)
            valid = [row for row in rows if row["step"] <= step]
            if len(valid) < len(rows):
                self.write_jsonl(name, valid)

    def steps(self) -> list[dict[str, Any]]:
        """Returns the complete rows of ``steps.jsonl``; none if there is no such file."""
        return self.read_jsonl(STEPS)

    def evals(self) -> list[dict[str, Any]]:
        """Returns the complete rows of ``evals.jsonl``; none if there is no such file."""
        return self.read_jsonl(EVALS)

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns the object in a JSON file."""
        return read_json(self.path / name)

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """Returns the rows of a file of JSON lines; none if there is no such file."""
        return read_jsonl(self.path / name)

    def _replace(self, name: str, text: str) -> None:
        self._require_open(name)
        write_durably(self.path / name, text.encode())

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self._require_open(name)
        assert isinstance(row["step"], int)
        line = strict_json(row, origin=f"{name}, step {row['step']}") + "\n"
        path = self.path / name
        with disk_faults(path), path.open("ab") as file:
            file.write(line.encode())

    def _require_open(self, name: str) -> None:
        assert self._lock is not None, "the run folder is closed"
        if self.is_finished:
            raise RunFolderError(f"{self.path}: the run is finished, {name} is never overwritten")

    def _drop_partial_line(self, name: str) -> None:
        path = self.path / name
        if not path.exists():
            return
        with disk_faults(path), path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


# Defaults of keys that older runs lack; none of them changes what a run computes.
_ADDED: dict[str, Any] = {"measure": {"clock_rounds": 0}}


def recorded_config(path: Path) -> Config:
    """Returns the resolved configuration that a run folder records.

    Raises:
        RunFolderError: If there is no run at ``path``.
        ConfigError: If what it records is not a valid configuration.
    """
    file = path / CONFIG
    if not file.is_file():
        raise RunFolderError(f"{path}: no run here to resume (it has no config.yaml)")
    return parse_config(merge(_ADDED, read_yaml(file)), origin=str(file))


def read_status(path: Path) -> dict[str, Any]:
    """Returns ``status.json``; "running" for a run that was killed before writing it."""
    file = path / STATUS
    return read_json(file) if file.is_file() else {"status": "running"}


def _require_vacant(path: Path) -> None:
    """Raises unless the folder is empty but for the leftovers of a killed ``create``."""
    if (path / CONFIG).is_file():
        if read_status(path).get("status") == "completed":
            raise RunFolderError(f"{path}: holds a finished run, which is never overwritten")
        raise RunFolderError(f"{path}: holds an unfinished run; --resume continues it")
    names = sorted(entry.name for entry in path.iterdir())
    others = [n for n in names if n != LOCK and not (n[0] == "." and n.endswith(".tmp"))]
    if others:
        raise RunFolderError(
            f"{path}: holds {others[0]!r} and is not a run folder; give a new or empty one"
        )


def _acquire(path: Path) -> int:
    """Returns the descriptor that holds the folder's lock; closing it releases the lock."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunFolderError(
            f"{path}: in use by another process; wait, or give another --out"
        ) from None
    except OSError as error:
        # A file system without locks is still usable.
        if not is_unsupported(error):
            os.close(descriptor)
            raise
    return descriptor
