"""Where the relative sources of a run or study start, so that it goes on from any folder.

Records must not name the machine or its user, so local sources are recorded relative to the folder
in which the command was given, or to the home. That folder is recorded too, seen from the record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from loracle.config.files import read_yaml
from loracle.config.run import Config, flatten
from loracle.records.files import read_json
from loracle.records.names import CONFIG, ENVIRONMENT, STUDY
from loracle.sources.spec import absolute, home_folder, paths_from, portable, start_folder

PATHS_FROM = "paths_from"
"""Key in ``environment.json`` of a run and in ``study.yaml``."""

_SOURCES = ("model", "data.source")


def portable_config(config: Config) -> Config:
    """Returns the config with local sources spelled without this machine's folders."""
    return _respelled(config, portable)


def absolute_config(config: Config) -> Config:
    """Returns the config with local sources that mean the same from every folder."""
    return _respelled(config, absolute)


def _respelled(config: Config, spell: Callable[[str], str]) -> Config:
    data = config.data.model_copy(update={"source": spell(config.data.source)})
    return config.model_copy(update={"model": spell(config.model), "data": data})


def recorded_start(folder: Path) -> str:
    """Returns what to record in ``folder`` of where relative sources start.

    A path from ``folder``, else from the home: on the way up it names nobody.
    """
    start, record, home = start_folder(), Path(os.path.realpath(folder)), home_folder()
    if home and start.is_relative_to(home) and not record.is_relative_to(home):
        return (PurePosixPath("~") / start.relative_to(home)).as_posix()
    return Path(os.path.relpath(start, record)).as_posix()


@contextmanager
def place_of(folder: Path) -> Iterator[None]:
    """Lets relative sources start where those of the run or study in ``folder`` do.

    Where nothing is recorded, as in a new folder, they start where they do already; also where
    none of them is found, as from a record that was copied without them.
    """
    start = _start_of(folder)
    if start is None or _is_only_here(_relative_sources(folder), start):
        yield
        return
    with paths_from(start):
        yield


def _is_only_here(paths: Sequence[str], start: Path) -> bool:
    """Returns whether none of these paths is found from ``start``, and one is from here."""
    at_start, here = (
        any((place / path).exists() for path in paths) for place in (start, start_folder())
    )
    return here and not at_start


def _start_of(folder: Path) -> Path | None:
    """Returns the folder at which a record's relative sources start; None if it names none."""
    run, study = folder / ENVIRONMENT, folder / STUDY
    if run.is_file():
        found = read_json(run).get(PATHS_FROM)
    else:
        found = read_yaml(study).get(PATHS_FROM) if study.is_file() else None
    if not isinstance(found, str):
        return None
    home = home_folder()
    if not found.startswith("~"):
        return Path(os.path.normpath(Path(os.path.realpath(folder)) / found))
    return home / Path(found).relative_to("~") if home else None


def _relative_sources(folder: Path) -> list[str]:
    """Returns the relative paths of the model and the data that a record names."""
    file = folder / CONFIG
    tree = flatten(read_yaml(file) if file.is_file() else read_yaml(folder / STUDY))
    named = [str(tree.get(prefix + key)) for prefix in ("", "config.") for key in _SOURCES]
    return [name[5:] for name in named if name.startswith("path:") and name[5:6] not in "/~"]
