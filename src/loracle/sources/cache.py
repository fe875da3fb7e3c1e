"""The cache: each entry is a complete, hashed folder with a manifest, or absent.

An entry is built in a hidden folder beside it, every file is hashed and synced, the manifest is
written last and the folder renamed into place. A process that dies leaves a hidden folder that is
never used as an entry and is removed by the next build. A lock file per entry keeps two processes
from building it at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from loracle.digest import Inputs, code_digest, key_of
from loracle.errors import SourceError
from loracle.records.files import disk_reason, is_unsupported, sync_folder, write_synced
from loracle.sources.spec import shown
from loracle.text import GIB, active_character
from loracle.version import package_version

Progress = Callable[[str], None]

MANIFEST = ".manifest.json"
# Raise when what a build writes changes, so that old entries are rebuilt.
_LAYOUT = 1
# assumed: hashing less than this takes about a second, negligible beside loading the file.
_HASHED_ON_USE_BYTES = GIB

CONVERSION_SOURCES = ("sources/gguf*.py", "sources/misfits.py")
_CONVERTERS = ("gguf", "numpy", "transformers", "tokenizers", "safetensors", "torch")

# Manifests whose files this process has already hashed, by entry.
_hashed: dict[Path, str] = {}


def cache_folder() -> Path:
    """Returns ``$LORACLE_CACHE``, else ``~/.cache/loracle``.

    Raises:
        SourceError: If that is in a home and there is none, or its name would act on a screen.
    """
    named = Path(os.environ.get("LORACLE_CACHE") or "~/.cache/loracle")
    try:
        folder = named.expanduser().absolute()
    except RuntimeError:
        raise SourceError(
            f"cache {named}: there is no home folder here; set LORACLE_CACHE to another folder"
        ) from None
    if code := active_character(str(folder)):
        raise SourceError(
            f"cache {folder}: holds the character {code}; set LORACLE_CACHE to another folder"
        )
    return folder


def obtain(
    entry: Path,
    *,
    source: str,
    revision: str,
    build: Callable[[Path, Path], None],
    progress: Progress,
) -> Path:
    """Returns ``entry``, complete and checked; builds it first if it is missing or damaged.

    Args:
        entry: Folder inside the cache.
        source: Source string, for the manifest.
        revision: Commit or hash of ``source``; an entry of another revision is rebuilt.
        build: Fills its first argument, an empty folder; the second is scratch space on the same
            disk, deleted afterwards.
        progress: Takes one line for the screen.

    Raises:
        SourceError: If ``build`` fails, or the cache cannot be written.
    """
    with disk_faults(entry):
        if _fault(entry, revision=revision) is None:
            return entry
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry, progress=progress) as is_locked:
            fault = _fault(entry, revision=revision)
            if fault is None:
                return entry
            if entry.exists():
                progress(f"cache: {entry.name} is damaged ({fault}); rebuilding it")
            if is_locked:  # what partial folders there are, processes that died left behind
                for leftover in entry.parent.glob(f"{_partial_prefix(entry)}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            _build(entry, source=source, revision=revision, build=build)
    return entry


def conversion_key(digest: str, *, member: str = "") -> str:
    """Returns the key of a model that is converted from a file, or a member of an archive.

    ``digest`` is the SHA-256 of the file or archive, which holds configuration and tokenizer too.
    """
    inputs = Inputs(
        weights=digest,
        config=None,
        generation=None,
        tokenizer=None,
        dtype="float32",
        quantization=None,
        device=None,
        versions={name: package_version(name) for name in _CONVERTERS},
        code=_conversion_digest(),
        asked={"member": member},
    )
    return key_of("conversion", inputs)


@lru_cache(maxsize=1)
def _conversion_digest() -> str:
    return code_digest(CONVERSION_SOURCES)


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into a ``SourceError`` that names the cache entry."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"cache {shown(path)}: {disk_reason(error)}; set LORACLE_CACHE to another folder"
        ) from error


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file as hex; an unchanged file is read once per process."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:  # noqa: ARG001 - cache keys
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(entry: Path, *, revision: str) -> str | None:
    """Returns why an entry cannot be used; None if it can."""
    try:
        text = (entry / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        files: Mapping[str, Any] = manifest["files"]
        if (manifest["layout"], manifest["revision"]) != (_LAYOUT, revision):
            return "made from another source or by an older version"
        fault = _file_fault(entry, files, hashed=_hashed.get(entry) == text)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    if fault is None:
        _hashed[entry] = text
    return fault


def _file_fault(entry: Path, files: Mapping[str, Any], *, hashed: bool) -> str | None:
    for name, expected in files.items():
        size_bytes = (entry / name).stat().st_size
        if size_bytes != expected["size_bytes"]:
            return f"{name} holds {size_bytes} bytes, not {expected['size_bytes']}"
        check = not hashed and size_bytes < _HASHED_ON_USE_BYTES
        if check and sha256_file(entry / name) != expected["sha256"]:
            return f"{name} does not match its hash"
    return None


@contextmanager
def _locked(entry: Path, *, progress: Progress) -> Iterator[bool]:
    """Holds the entry's lock; yields False if the file system has no locks."""
    with entry.with_name(f".{entry.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            progress(f"cache: waiting for another process that builds {entry.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        except OSError as error:
            if not is_unsupported(error):
                raise
            is_locked = False
        yield is_locked


def _partial_prefix(entry: Path) -> str:
    return f".{entry.name}.partial-"


def _build(entry: Path, *, source: str, revision: str, build: Callable[[Path, Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(entry), dir=entry.parent))
    try:
        fresh, scratch = partial / "entry", partial / "scratch"
        fresh.mkdir()
        scratch.mkdir()
        build(fresh, scratch)
        _seal(fresh, source=source, revision=revision)
        if entry.exists():
            entry.rename(partial / "damaged")
        fresh.rename(entry)
        sync_folder(entry.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _seal(folder: Path, *, source: str, revision: str) -> None:
    """Syncs every file of a finished folder and writes its manifest last."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {"layout": _LAYOUT, "source": source, "revision": revision, "files": files}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(folder)
