"""Atomic file writes, JSON without NaN, and dataclasses to and from JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from loracle.errors import NonFiniteError, RunFolderError, UsageError

T = TypeVar("T")

# Errors of the file system, in words that a user can act on, and what a run can do about them.
_SPACE, _PLACE = "; free some space or give another --out", "; give another --out"
_FAULTS = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EACCES: ("no permission to write there", _PLACE),
    errno.EPERM: ("no permission to write there", _PLACE),
    errno.EROFS: ("the file system is read-only", _PLACE),
    errno.ENOTDIR: ("a file is where a folder should be", _PLACE),
    errno.EEXIST: ("a file is where a folder should be", _PLACE),
    errno.EISDIR: ("a folder is where a file should be", ""),
}

# How safetensors quotes an error of the system.
_OS_ERROR = re.compile(r"os error (\d+)")

# Network and FUSE folders (Colab's Drive) that cannot sync a directory or lock a file.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into a `RunFolderError` of one line about ``path``."""
    try:
        yield
    except OSError as error:
        _, advice = _FAULTS.get(error.errno or 0, ("", ""))
        reason = disk_reason(error) + advice
        raise RunFolderError(f"{path}: cannot be written: {reason}") from error


def disk_reason(error: OSError) -> str:
    """Returns what the file system says, in the user's words."""
    reason, _ = _FAULTS.get(error.errno or 0, (error.strerror or "input/output error", ""))
    return reason


@contextmanager
def plain_os_errors() -> Iterator[None]:
    """Turns safetensors' own error for a full disk and the like back into an ``OSError``.

    Raises:
        RuntimeError: For its other errors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise RuntimeError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_durably(path: Path, content: bytes) -> None:
    """Replaces ``path`` through a synced temporary file beside it.

    Raises:
        RunFolderError: If it cannot be written; ``path`` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_faults(path):
        try:
            write_synced(temporary, content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, data: Mapping[str, Any], *, indent: int = 2) -> None:
    """Replaces a JSON file.

    Raises:
        NonFiniteError: If a value is NaN or infinite.
        RunFolderError: If it cannot be written.
    """
    write_durably(path, json_bytes(data, origin=path.name, indent=indent))


def json_bytes(data: Mapping[str, Any], *, origin: str, indent: int = 2) -> bytes:
    """Returns the content of a JSON file, as `strict_json` does."""
    return strict_json(data, origin=origin, indent=indent).encode() + b"\n"


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and syncs it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Syncs the names in a folder to the disk, where the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_unsupported(error):
            raise
    finally:
        os.close(descriptor)


def is_unsupported(error: OSError) -> bool:
    """Returns whether the file system does not support the operation."""
    return error.errno in _UNSUPPORTED


def strict_json(data: Any, *, origin: str, indent: int | None = None) -> str:
    """Returns ``data`` as JSON that any parser reads: no NaN, no Infinity.

    Raises:
        NonFiniteError: Naming the first value that is neither finite nor null.
    """
    fault = _non_finite(data, key="")
    if fault:
        raise NonFiniteError(f"{origin}: {fault}; a value that was not measured is null")
    return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)


def read_json(
    path: Path, *, origin: str | None = None, fault: type[UsageError] = RunFolderError
) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
        path: The file.
        origin: Names it in messages; None: its path.
        fault: Raised if the file cannot be read or is not a JSON object.
    """
    origin = origin or str(path)
    try:
        return _parse(_read(path, origin=origin), origin=origin)
    except RunFolderError as error:
        raise fault(str(error)) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines, without a last line that was cut short.

    Raises:
        RunFolderError: If it cannot be read or any other line is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, _ = _read(path, origin=str(path)).split(b"\n")
    return [_parse(line, origin=f"{path}:{n}") for n, line in enumerate(lines, 1)]


def to_json(value: Any) -> dict[str, Any]:
    """Returns a dataclass as plain data: its fields in order, then its computed fields."""
    data: dict[str, Any] = _adapter(value.__class__).dump_python(value)
    return data


def from_json(kind: Callable[..., T], data: Mapping[str, Any], *, origin: str) -> T:
    """Returns the dataclass that `to_json` wrote; keys that it does not have are ignored.

    Raises:
        RunFolderError: Naming the first key that is missing or of another type.
    """
    try:
        value: T = _adapter(kind).validate_python(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise RunFolderError(f"{origin}: {key}: {fault['msg'].lower()}") from None
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _read(path: Path, *, origin: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{origin}: cannot be read ({error.strerror})") from None


def _parse(text: bytes, *, origin: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError:
        raise RunFolderError(f"{origin}: not JSON") from None
    if not isinstance(data, dict):
        raise RunFolderError(f"{origin}: must be a JSON object, got {type(data).__name__}")
    return data


def _non_finite(data: Any, *, key: str) -> str | None:
    """Returns ``key is value`` for the first float that is not finite."""
    if isinstance(data, float):
        return None if math.isfinite(data) else f"{key or 'value'} is {data}"
    items: list[tuple[Any, Any]] = []
    if isinstance(data, Mapping):
        items = list(data.items())
    elif isinstance(data, Sequence) and not isinstance(data, str):
        items = list(enumerate(data))
    faults = (
        _non_finite(value, key=f"{key}.{name}" if key else str(name)) for name, value in items
    )
    return next(filter(None, faults), None)
