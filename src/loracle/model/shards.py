"""Append-only files of byte strings by key, read and written by several processes.

Each writer has its own file of contents and its own file of index entries. Contents are written
before their entry and carry a checksum, so that what a crash, a full disk or a failing disk leaves
behind is ignored. Nothing is synced to the disk, because everything here can be computed again.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEY_BYTES = 32
_CHECKSUM_BYTES = 16
# Key, offset and size of the content, checksum over key and content.
_ENTRY = struct.Struct(f"<{KEY_BYTES}sQQ{_CHECKSUM_BYTES}s")


@dataclass(frozen=True)
class _Place:
    contents: Path
    offset: int
    size: int
    checksum: bytes


class Shards:
    """The shards in one folder, as seen by one process.

    If the folder cannot be written or the disk is full, only writing stops.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{uuid.uuid4().hex}.index"
        self._read_bytes: dict[Path, int] = {}
        self._places: dict[bytes, list[_Place]] = {}
        self._writable = True

    def read(self, key: bytes) -> bytearray | None:
        """Returns the valid content that any process appended under ``key``; None without one."""
        if not self._places.get(key):
            self._refresh()
        places = self._places.get(key, [])
        while places:
            content = _content(places[-1], key=key)
            if content is not None:
                return content
            places.pop()
        return None

    def append(self, key: bytes, content: bytes) -> None:
        """Adds ``content`` under a key of ``KEY_BYTES``."""
        if not self._writable:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._own.with_suffix(".contents").open("ab") as contents:
                offset = contents.tell()
                contents.write(content)
            with self._own.open("ab") as index:
                index.write(_ENTRY.pack(key, offset, len(content), _checksum(key, content)))
        except OSError:
            self._writable = False

    def _refresh(self) -> None:
        """Reads the entries written since the last call."""
        for index in sorted(self._folder.glob("*.index")):
            for key, offset, size, checksum in self._new_entries(index):
                place = _Place(index.with_suffix(".contents"), offset, size, checksum)
                self._places.setdefault(key, []).append(place)

    def _new_entries(self, index: Path) -> Iterator[tuple[bytes, int, int, bytes]]:
        start = self._read_bytes.get(index, 0)
        try:
            with index.open("rb") as file:
                file.seek(start)
                added = file.read()
        except OSError:
            return
        complete = len(added) - len(added) % _ENTRY.size
        self._read_bytes[index] = start + complete
        yield from _ENTRY.iter_unpack(added[:complete])


def _content(place: _Place, *, key: bytes) -> bytearray | None:
    try:
        if place.offset + place.size > place.contents.stat().st_size:
            return None
        content = bytearray(place.size)
        with place.contents.open("rb") as file:
            file.seek(place.offset)
            file.readinto(content)
    except OSError:
        return None
    return content if _checksum(key, content) == place.checksum else None


def _checksum(key: bytes, content: bytes | bytearray) -> bytes:
    digest = hashlib.blake2b(key, digest_size=_CHECKSUM_BYTES)
    digest.update(content)
    return digest.digest()
