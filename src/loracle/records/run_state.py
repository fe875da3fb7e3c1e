"""What a run's folder says of its run: configuration, status, whether it can be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from loracle.config.files import merge, parse_config, read_yaml
from loracle.config.run import Config, difference
from loracle.errors import RunFolderError
from loracle.records.files import read_json
from loracle.records.manifest import require_intact
from loracle.records.names import CONFIG, DATA, LOCK, MANIFEST, MODULES, STATUS

Status = Literal["running", "completed", "failed", "interrupted"]

REMEDY = "restore it, or remove the run's folder and run it again"
"""What can be done about a damaged record of a run."""

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
        raise no_run(path)
    return parse_config(merge(_ADDED, read_yaml(file)), origin=str(file))


def no_run(path: Path) -> RunFolderError:
    """Returns the error that there is no run in a folder."""
    return RunFolderError(f"{path}: no run here to resume (it has no {CONFIG})")


def require_same(recorded: Config, config: Config | None, *, path: Path) -> None:
    """Checks that a run to resume is asked for as it was started.

    Raises:
        RunFolderError: Listing what differs.
    """
    differences = difference(recorded, config) if config else []
    if differences:
        raise RunFolderError(
            f"{path}: was started with another configuration ({'; '.join(differences)}); "
            "resume with the recorded one, or give another --out"
        )


def read_status(path: Path) -> dict[str, Any]:
    """Returns ``status.json``; "running" for a run that was killed before writing it.

    Raises:
        RunFolderError: If it is damaged.
    """
    file = path / STATUS
    if not file.is_file():
        return {"status": "running"}
    status = read_json(file)
    if status.get("status") not in get_args(Status):
        raise RunFolderError(f"{file}: {status.get('status')!r} is no status of a run")
    return status


def require_inputs(path: Path) -> None:
    """Checks what a run starts from, and the status of a finished one, against its manifest.

    The rest of a finished run is checked where its result is read.

    Raises:
        RunFolderError: Naming the first file that is not what was written.
    """
    require_intact(path, names=(CONFIG, DATA, MODULES, STATUS), remedy=REMEDY)


def require_vacant(path: Path) -> None:
    """Checks that a folder is empty but for the leftovers of a killed ``create``.

    Raises:
        RunFolderError: Naming what is in it.
    """
    if (path / CONFIG).is_file():
        if read_status(path).get("status") == "completed":
            raise RunFolderError(f"{path}: holds a finished run, which is never overwritten")
        raise RunFolderError(f"{path}: holds an unfinished run; --resume continues it")
    names = sorted(entry.name for entry in path.iterdir())
    is_leftover = re.compile(rf"{re.escape(LOCK)}|{re.escape(MANIFEST)}|\..*\.tmp").fullmatch
    others = [name for name in names if not is_leftover(name)]
    if others:
        raise RunFolderError(
            f"{path}: holds {others[0]!r} and is not a run folder; give a new or empty one"
        )
