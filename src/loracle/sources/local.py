"""``path:`` sources: local files and folders, pinned by the hash of their content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loracle.errors import SourceError
from loracle.sources import folders
from loracle.sources.cache import Progress, cache_folder, conversion_key, obtain, sha256_file
from loracle.sources.spec import PathSource, ResolvedSource
from loracle.text import GIB

# assumed: hashing more than this takes long enough to announce it.
_ANNOUNCED_BYTES = 2 * GIB


def resolve_local_model(source: PathSource, *, progress: Progress) -> ResolvedSource:
    """Returns a model folder as it is, or a GGUF file converted into the cache.

    Raises:
        SourceError: If the path does not exist, or a file that a model needs is missing.
    """
    path, name = source.path, source.canonical
    with _readable(name):
        gguf = _only_gguf(path, name=name)
        if gguf is None:
            folders.require_model_folder(path, name=name)
            return _pinned(source, files=folders.model_files(path), progress=progress)
        _announce([gguf], name=name, progress=progress)
        digest = sha256_file(gguf)
    entry = cache_folder() / "models" / f"{gguf.stem}-{conversion_key(digest)[:12]}"
    revision = f"sha256:{digest}"

    def build(folder: Path, _scratch: Path) -> None:
        from loracle.sources.gguf import convert_gguf

        progress(f"converting {gguf.name} to safetensors, once")
        convert_gguf(gguf, folder=folder, name=name)

    obtain(entry, source=name, revision=revision, build=build, progress=progress)
    return ResolvedSource(entry, name, revision)


def resolve_local_data(source: PathSource, *, progress: Progress) -> ResolvedSource:
    """Returns a data file, or a folder of them.

    Raises:
        SourceError: If the path does not exist, or the folder holds no data.
    """
    path, name = source.path, source.canonical
    with _readable(name):
        if not path.exists():
            raise SourceError(f"{name}: no such file or folder")
        files = [path]
        if path.is_dir():
            files = folders.require_data_files(path, name=name)
            card = path / folders.DATA_CARD
            files += [card] if card.is_file() else []
        return _pinned(source, files=files, progress=progress)


def _pinned(source: PathSource, *, files: list[Path], progress: Progress) -> ResolvedSource:
    _announce(files, name=source.canonical, progress=progress)
    revision = folders.content_revision(source.path, files=files)
    return ResolvedSource(source.path, source.canonical, revision)


def _announce(files: Iterable[Path], *, name: str, progress: Progress) -> None:
    total_bytes = sum(file.stat().st_size for file in files)
    if total_bytes > _ANNOUNCED_BYTES:
        progress(f"hashing {name} ({total_bytes / GIB:.1f} GiB)")


def _only_gguf(path: Path, *, name: str) -> Path | None:
    """Returns the GGUF file that ``path`` is or, without safetensors beside it, holds."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise SourceError(f"{name}: a model is a folder or a .gguf file, got another file")
    if not path.is_dir():
        raise SourceError(f"{name}: no such folder or file")
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise SourceError(f"{name}: holds {len(files)} GGUF files ({names}); name one of them")
    return files[0]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns an ``OSError`` while reading into a ``SourceError``."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{name}: cannot be read ({error.strerror})") from error
