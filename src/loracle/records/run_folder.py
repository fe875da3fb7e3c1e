"""The run folder: all files of a run, readable at any moment, also after SIGKILL.

::

    config.yaml     resolved configuration        steps.jsonl     one row per optimizer step
    status.json     running, completed, ...       evals.jsonl     one row per validation
    environment.json, data.json, modules.json, examples.jsonl, result.json, adapter/, checkpoints/

Whole files are replaced atomically. The two growing files gain one line at a time; a last line that
was cut short is dropped, and checkpoints hold copies. ``manifest.json`` tells whether all are as
they were written (`loracle.records.manifest`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from loracle.config.files import dump_yaml
from loracle.config.run import Config
from loracle.errors import RunFolderError
from loracle.records.files import (
    disk_faults,
    json_bytes,
    read_json,
    read_jsonl,
    strict_json,
    write_durably,
)
from loracle.records.lock import acquired
from loracle.records.manifest import Manifest, faults_of, read_manifest
from loracle.records.names import (
    ADAPTER,
    ANSWERS,
    CHECKPOINTS,
    CONFIG,
    DATA,
    ENVIRONMENT,
    EVALS,
    MEMORY,
    MODULES,
    RUN_RECORDS,
    STATUS,
    STEPS,
    TRACEBACK,
)
from loracle.records.rows import content_of, drop_partial_line, read_steps
from loracle.records.run_state import (
    Status,
    no_run,
    read_status,
    recorded_config,
    require_inputs,
    require_same,
    require_vacant,
)

# Written as a whole while the run goes on; their digests are listed before they are.
_INPUTS, _PASSING = (CONFIG, ENVIRONMENT, DATA, MODULES), (ANSWERS, MEMORY)
_WHOLE = (*_INPUTS, *_PASSING)
# Of these, what a resumed run can do without: it is made again.
_REMADE = (ENVIRONMENT, *_PASSING)

_STATUS_FIELDS = ("phase", "step", "max_steps", "error")
_PREPARING = "prepare"


class RunFolder(AbstractContextManager["RunFolder"]):
    """One run's folder, held by one process at a time.

    The kernel releases the lock if the process dies. A completed run can be read and never written.

    Attributes:
        path: The folder.
        config: The run's resolved configuration.
        status: Contents of ``status.json``.
        failed_before: Whether the run had failed when it was reopened.
        has_begun: Whether anything but preparations was done since it was opened.
        notices: What was found damaged when it was reopened, and is made again.
    """

    def __init__(self, path: Path, *, config: Config, lock: int) -> None:
        self.path = path
        self.config = config
        self.status: dict[str, Any] = {}
        self.failed_before = False
        self.has_begun = False
        self.notices: list[str] = []
        self._status_before = self.status
        self._lock: int | None = lock
        self._manifest = Manifest(path)

    @classmethod
    def create(cls, path: Path, *, config: Config) -> Self:
        """Returns a new run's folder, with ``config.yaml`` and the status "running".

        Raises:
            RunFolderError: If it holds a run or anything else, is in use or cannot be written.
        """
        with disk_faults(path):
            path.mkdir(parents=True, exist_ok=True)
            require_vacant(path)
        with acquired(path) as lock:
            # Again under the lock: another process may have created a run meanwhile.
            require_vacant(path)
            run = cls(path, config=config, lock=lock)
            run.write_yaml(CONFIG, config.model_dump(mode="json"))
            run.set_status("running", max_steps=config.train.max_steps)
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
        if not (path / CONFIG).is_file():
            raise no_run(path)
        with acquired(path) as lock:
            # Under the lock: another process may have written meanwhile.
            require_inputs(path)
            recorded = recorded_config(path)
            require_same(recorded, config, path=path)
            run = cls(path, config=config or recorded, lock=lock)
            run._continue(recorded)
        return run

    def _continue(self, recorded: Config) -> None:
        """Prepares an unfinished run for writing."""
        try:
            self.status = read_status(self.path)
        except RunFolderError as error:
            # That of a finished run was checked against the manifest above.
            self.notices.append(f"{error}; taken as unfinished")
            self.status = {"status": "running"}
        self._status_before = self.status
        self.failed_before = self.status.get("status") == "failed"
        if self.is_finished:
            return
        with disk_faults(self.path):
            self._clean()
        self._manifest = Manifest(self.path, read_manifest(self.path))
        self._manifest.keep_only(_WHOLE)
        if self.config != recorded:
            self.write_yaml(CONFIG, self.config.model_dump(mode="json"))
        self.set_status("running")

    def _clean(self) -> None:
        """Removes what earlier processes left half done, and what was damaged and can be remade."""
        for name in (STEPS, EVALS):
            drop_partial_line(self.path / name)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        (self.path / TRACEBACK).unlink(missing_ok=True)
        for name, fault in faults_of(self.path, names=_REMADE).items():
            self.notices.append(f"{self.path.name}/{name}: {fault}; made again")
            (self.path / name).unlink(missing_ok=True)

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

    def __exit__(self, *_: object) -> None:
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
        content = json_bytes(new, origin=STATUS)
        self._require_open(STATUS)
        if status == "completed":
            adapter = sorted((self.path / ADAPTER).glob("*"))
            files = [f"{ADAPTER}/{file.name}" for file in adapter if file.is_file()]
            self._manifest.seal([*RUN_RECORDS, *files], last={STATUS: content})
        else:
            write_durably(self.path / STATUS, content)
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
        self._replace(name, json_bytes(data, origin=name))

    def write_yaml(self, name: str, data: Mapping[str, Any]) -> None:
        """Replaces a YAML file."""
        self._replace(name, dump_yaml(data).encode())

    def write_text(self, name: str, text: str) -> None:
        """Replaces a file of plain text."""
        self._replace(name, text.encode())

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces a file of one JSON object per line."""
        lines = [strict_json(row, origin=f"{name}:{n}") + "\n" for n, row in enumerate(rows, 1)]
        self._replace(name, "".join(lines).encode())

    def append_step(self, row: Mapping[str, Any]) -> None:
        """Adds a row to ``steps.jsonl``; it needs a ``step``."""
        self._append(STEPS, row)

    def append_eval(self, row: Mapping[str, Any]) -> None:
        """Adds a row to ``evals.jsonl``; it needs a ``step``."""
        self._append(EVALS, row)

    def grown(self) -> dict[str, bytes]:
        """Returns the contents of the growing files, for a checkpoint to keep."""
        return {name: content_of(self.path / name) for name in (STEPS, EVALS) if self.has(name)}

    def put_back(self, contents: Mapping[str, bytes]) -> None:
        """Makes the growing files what they were at a checkpoint; without contents, empty."""
        for name in (STEPS, EVALS):
            content, found = contents.get(name, b""), content_of(self.path / name)
            if not found.startswith(content):
                self.notices.append(f"{name}: not what was written; taken from the checkpoint")
            if found != content:
                self._replace(name, content)

    def steps(self) -> list[dict[str, Any]]:
        """Returns the complete rows of ``steps.jsonl``, as `read_steps` does."""
        return read_steps(self.path)

    def evals(self) -> list[dict[str, Any]]:
        """Returns the complete rows of ``evals.jsonl``; none if there is no such file."""
        return read_jsonl(self.path / EVALS)

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns the object in a JSON file."""
        return read_json(self.path / name)

    def _replace(self, name: str, content: bytes) -> None:
        self._require_open(name)
        if name in _WHOLE:
            self._manifest.replace({name: content}, may_go=name in _PASSING)
        else:
            write_durably(self.path / name, content)

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
