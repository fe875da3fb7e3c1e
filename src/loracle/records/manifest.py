"""Digests of a folder's records: what a reader finds is what was written, or is named.

``manifest.json`` of a run or study lists, for each file, the SHA-256 of every content that is
valid. That is one, but for a file that is being replaced: then the new and the old are valid, so
that a kill at any moment leaves nothing that looks damaged. ``null``: the file may be absent.

A folder without a manifest is of an older version: its records are read, and said to be unverified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from loracle.digest import digest_of
from loracle.errors import RunFolderError
from loracle.records.files import read_json, write_durably, write_json
from loracle.records.names import MANIFEST

_SCHEMA = 1

Valid = dict[str, list[str | None]]
"""Name of a file -> SHA-256 of each valid content; None: it may be absent."""


class Manifest:
    """The digests of one folder, kept in step with its files by the process that writes them."""

    def __init__(self, folder: Path, valid: Mapping[str, list[str | None]] | None = None) -> None:
        self._folder = folder
        self._valid: Valid = dict(valid or {})

    def replace(self, contents: Mapping[str, bytes], *, may_go: bool = False) -> None:
        """Replaces files of the folder, durably.

        Args:
            contents: Name -> new content.
            may_go: The files may also be absent, as those that are removed when a run is finished.

        Raises:
            RunFolderError: If they cannot be written.
        """
        new = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        pending = {name: [digest, *self._before(name)] for name, digest in new.items()}
        self._write(self._valid | pending)
        for name, content in contents.items():
            write_durably(self._folder / name, content)
        gone: list[str | None] = [None] if may_go else []
        self._valid |= {name: [digest, *gone] for name, digest in new.items()}

    def keep_only(self, names: Iterable[str]) -> None:
        """Forgets the other files."""
        self._valid = {name: self._valid[name] for name in names if name in self._valid}
        self.settle()

    def seal(self, names: Iterable[str], *, last: Mapping[str, bytes]) -> None:
        """Lists these files as they are on the disk, then replaces the ``last`` ones.

        Raises:
            RunFolderError: If one of them is not what was written before.
        """
        for name in names:
            digest = file_digest(self._folder / name)
            if digest not in self._valid.get(name, [digest]):
                raise RunFolderError(f"{self._folder / name}: {_fault(digest)}")
            self._valid[name] = [digest]
        self._valid = {name: digests for name, digests in self._valid.items() if digests != [None]}
        self.replace(last)

    def settle(self) -> None:
        """Writes the manifest as it is after the last replacement."""
        self._write(self._valid)

    def _write(self, valid: Valid) -> None:
        data = {"schema": _SCHEMA, "files": valid, "sha256": digest_of(valid)}
        write_json(self._folder / MANIFEST, data, indent=1)

    def _before(self, name: str) -> list[str | None]:
        """Returns the digest of what a file holds now, unless that is damage."""
        digest = file_digest(self._folder / name)
        return [digest] if digest in self._valid.get(name, [digest]) else []


def write_records(folder: Path, contents: Mapping[str, bytes], *, known: Iterable[str]) -> None:
    """Replaces files of a folder and its manifest, durably.

    Args:
        folder: A folder whose files are written now and then, each time as a whole.
        contents: Name -> new content.
        known: Files of a folder without a manifest that a new one lists as they are.

    Raises:
        RunFolderError: If they cannot be written, or the manifest is damaged.
    """
    valid = read_manifest(folder)
    if valid is None:
        found = {name: file_digest(folder / name) for name in known}
        valid = {name: [digest] for name, digest in found.items() if digest is not None}
    manifest = Manifest(folder, valid)
    manifest.replace(contents)
    manifest.settle()


def forget(folder: Path, names: Iterable[str]) -> None:
    """Takes files that were removed on purpose off a folder's manifest, if it has one.

    Raises:
        RunFolderError: If it cannot be written, or is damaged.
    """
    valid, gone = read_manifest(folder), set(names)
    if valid is not None and gone & valid.keys():
        Manifest(folder, valid).keep_only([name for name in valid if name not in gone])


def read_manifest(folder: Path) -> Valid | None:
    """Returns the digests of a folder's files; None if it has no manifest.

    Raises:
        RunFolderError: If the manifest is not what was written.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    data = read_json(path)
    files = data.get("files")
    if not isinstance(files, dict) or data.get("sha256") != digest_of(files):
        raise RunFolderError(
            f"{path}: is not what was written; restore it, or remove it to read the folder "
            "without verification"
        )
    return files


def faults_of(
    folder: Path, *, names: Iterable[str] | None = None, below: str = ""
) -> dict[str, str]:
    """Returns what is wrong with each file that is not as the manifest says; empty without one.

    Args:
        folder: The manifest's folder.
        names: Only these, where they are listed; None: all listed ones.
        below: Folder in it whose files are meant; by default those beside the manifest.

    Raises:
        RunFolderError: If the manifest itself is damaged.
    """
    valid = read_manifest(folder) or {}
    listed = valid if names is None else [name for name in names if name in valid]
    meant = [name for name in listed if name.rpartition("/")[0] == below]
    digests = {name: file_digest(folder / name) for name in meant}
    return {name: _fault(digests[name]) for name in meant if digests[name] not in valid[name]}


def require_intact(
    folder: Path, *, names: Iterable[str] | None = None, below: str = "", remedy: str
) -> None:
    """Checks a folder's files against its manifest, as `faults_of` does.

    Raises:
        RunFolderError: Naming the first file that differs, and the remedy.
    """
    for name, fault in faults_of(folder, names=names, below=below).items():
        raise RunFolderError(f"{folder / name}: {fault}; {remedy}")


def is_verified(folder: Path) -> bool:
    """Returns whether the folder's records can be checked at all."""
    return (folder / MANIFEST).exists()


def file_digest(path: Path) -> str | None:
    """Returns the SHA-256 of a file, in hex; None if there is none.

    Raises:
        RunFolderError: If it is there and cannot be read.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror})") from None


def _fault(digest: str | None) -> str:
    return "is missing" if digest is None else f"is not what was written (see {MANIFEST})"
