"""Source strings ``hub:``, ``path:`` and ``pypi:``: parsed, and in the form to record."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loracle.errors import SourceError, did_you_mean
from loracle.text import active_character

_SCHEMES = ("hub", "path", "pypi")
_HUB = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^\s@]+))?")
_PYPI = re.compile(
    r"(?P<project>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][\w.!+-]*)"
    r"/(?P<member>[^#]+)(?:#(?P<fragment>.*))?"
)
# Set while a run or study goes on that was begun in another folder.
_start: ContextVar[Path | None] = ContextVar("_start", default=None)
_SHA256 = re.compile(r"sha256=([0-9a-f]{64})")


@dataclass(frozen=True)
class HubSource:
    """A repository on the model hub."""

    repo: str
    """``org/name``."""
    revision: str
    """Branch, tag or commit."""

    @property
    def canonical(self) -> str:
        """The string to record, beside the commit that was resolved."""
        return f"hub:{self.repo}"


@dataclass(frozen=True)
class PathSource:
    """A local file or folder."""

    path: Path
    """Absolute path, links not followed."""

    @property
    def canonical(self) -> str:
        """The string to record; names no machine and no user."""
        return f"path:{shown(self.path)}"


@dataclass(frozen=True)
class PypiSource:
    """One file inside a wheel or sdist on the Python package index."""

    project: str
    version: str
    member: str
    """Path inside the archive, without the leading folder of an sdist."""
    sha256: str
    """Hash of the archive, 64 hex digits."""

    @property
    def canonical(self) -> str:
        """The string to record, beside the hash."""
        return f"pypi:{self.project}=={self.version}/{self.member}"


Source = HubSource | PathSource | PypiSource


@dataclass(frozen=True)
class ResolvedSource:
    """A local path, and the source to record for it."""

    path: Path
    """Absolute path of the local file or folder."""
    source: str
    """``hub:``, ``path:`` or ``pypi:`` string without the pin; names no machine."""
    revision: str
    """The hub's commit, or ``sha256:<hex>`` of the archive or content."""

    @property
    def stock_name(self) -> tuple[str, str | None]:
        """Name and revision by which Transformers and PEFT find it, on this machine if it is local.

        A hub model's id and commit; of another, its folder and None.
        """
        scheme, _, name = self.source.partition(":")
        return (name, self.revision) if scheme == "hub" else (str(self.path), None)


def parse_source(text: str) -> Source:
    """Parses a source string without looking anything up.

    Raises:
        SourceError: If it is not a well-formed ``hub:``, ``path:`` or ``pypi:`` string.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in _SCHEMES:
        hint = did_you_mean(scheme, _SCHEMES) if colon else ""
        raise SourceError(f"source '{text}': must start with hub:, path: or pypi:{hint}")
    if scheme == "hub":
        match = _HUB.fullmatch(rest)
        if match is None:
            raise SourceError(f"source '{text}': must be hub:org/name or hub:org/name@revision")
        return HubSource(repo=match["repo"], revision=match["revision"] or "main")
    if scheme == "pypi":
        return _parse_pypi(rest, text=text)
    return _parse_path(rest, text=text)


def start_folder() -> Path:
    """Returns the folder at which relative ``path:`` sources start, and from which they are shown.

    The current one, unless `paths_from` says otherwise.
    """
    return _start.get() or Path.cwd()


@contextmanager
def paths_from(folder: Path) -> Iterator[None]:
    """Lets relative ``path:`` sources start at ``folder`` inside the block, as a record's do."""
    before = _start.set(_absolute(folder))
    try:
        yield
    finally:
        _start.reset(before)


def home_folder() -> Path | None:
    """Returns the user's home; None where there is none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def shown(path: Path, *, start: Path | None = None) -> str:
    """Returns ``path`` relative to ``start``, or as ``~/...`` elsewhere in the home.

    Never absolute: records must not name the machine or its user. ``start`` defaults to
    `start_folder`.
    """
    absolute, home, start = _absolute(path), home_folder(), start or start_folder()
    if home and not absolute.is_relative_to(start) and absolute.is_relative_to(home):
        return (PurePosixPath("~") / absolute.relative_to(home)).as_posix()
    return Path(os.path.relpath(absolute, start)).as_posix()


def _parse_path(rest: str, *, text: str) -> PathSource:
    if not rest.strip() or "\0" in rest:
        raise SourceError(f"source '{text}': must be path:FILE or path:FOLDER")
    try:
        path = _absolute(start_folder() / Path(rest).expanduser())
    except RuntimeError:
        raise SourceError(f"source '{text}': no such home folder") from None
    if code := active_character(str(path)):  # the folder we are in may hold it too
        raise SourceError(f"source '{text}': {path} holds the character {code}; rename it")
    return PathSource(path)


def _absolute(path: Path) -> Path:
    """Returns ``path`` from the root, without ``..``; links are not resolved."""
    return Path(os.path.normpath(path.absolute()))


def _parse_pypi(rest: str, *, text: str) -> PypiSource:
    match = _PYPI.fullmatch(rest)
    if match is None:
        raise SourceError(
            f"source '{text}': must be pypi:project==version/member#sha256=<hash of the archive>"
        )
    member, fragment = match["member"], match["fragment"]
    if not is_safe_member(member):
        raise SourceError(
            f"source '{text}': '{member}' must be a relative path inside the archive, without '..'"
        )
    if fragment is None:
        raise SourceError(
            f"source '{text}': a pypi: source must be pinned; add #sha256=<64 hex digits>, the "
            "archive's hash as the package index lists it ('pip hash FILE' prints it)"
        )
    digest = _SHA256.fullmatch(fragment.lower())
    if digest is None:
        raise SourceError(f"source '{text}': '#{fragment}' must be #sha256=<64 hex digits>")
    return PypiSource(match["project"], match["version"], member, digest[1])


def is_safe_member(name: str) -> bool:
    """Returns whether an archive member's name stays inside the folder it is unpacked into."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not set(name) & set("\\:\0\n\r")


def portable(source: str) -> str:
    """Returns a source string without this machine's folders, relative to `start_folder`."""
    return parse_source(source).canonical if source.startswith("path:") else source


def absolute(source: str) -> str:
    """Returns a source string that means the same wherever relative ones start."""
    parsed = parse_source(source) if source.startswith("path:") else None
    return f"path:{parsed.path}" if isinstance(parsed, PathSource) else source
