"""What the user's configuration of pip says about reaching the package index."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loracle.errors import SourceError

# What each of these sets, the next one overrides, as for 'pip download'.
_SECTIONS = ("global", "download", ":env:")
_LINE = re.compile(rf"(?P<section>{'|'.join(_SECTIONS)})\.(?P<key>[a-z-]+)=(?P<value>'.*'|\".*\")")
_RETRIES, _TIMEOUT_S = 5, 15.0
"""source (pip's own defaults)."""


@dataclass(frozen=True)
class PipSettings:
    """Where and how pip would look for an archive."""

    index_url: str | None
    """None: pip's default. This and the next ones are URLs, of folders too."""
    extra_index_urls: tuple[str, ...]
    no_index: bool
    """Only ``find_links`` count."""
    find_links: tuple[str, ...]
    """Folders, pages of links, or archives."""
    trusted_hosts: tuple[str, ...]
    """``host`` or ``host:port``, whose certificates are not checked."""
    certificates: Path | None
    """Bundle or folder of the authorities; None: those of the system."""
    client_certificate: Path | None
    proxy: str | None
    """None: the proxies that the environment names."""
    retries: int
    timeout_s: float


def read_pip_settings() -> PipSettings:
    """Returns pip's settings from its files and environment, as pip itself lists them.

    Raises:
        SourceError: If there is no pip, or its configuration cannot be read.
    """
    values = _values()
    bundle = values.get("cert") or _first_of("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    client = values.get("client-cert")
    index = values.get("index-url") or values.get("pypi-url")
    return PipSettings(
        index_url=_address(index) if index else None,
        extra_index_urls=tuple(map(_address, _words(values, "extra-index-url"))),
        no_index=values.get("no-index", "0").lower() in ("y", "yes", "t", "true", "on", "1"),
        find_links=tuple(map(_address, _words(values, "find-links"))),
        trusted_hosts=_words(values, "trusted-host"),
        certificates=_path(bundle) if bundle else None,
        client_certificate=_path(client) if client else None,
        proxy=values.get("proxy"),
        retries=int(_number(values, "retries", default=_RETRIES)),
        timeout_s=_number(values, "timeout", "default-timeout", default=_TIMEOUT_S),
    )


def _values() -> dict[str, str]:
    listed: dict[tuple[str, str], list[str]] = {}
    # -vvv: a configuration that makes pip quiet would hide the list.
    for line in _pip_config("list", "-vvv").splitlines():
        if match := _LINE.fullmatch(line):
            key = match["section"], match["key"]
            listed.setdefault(key, []).append(ast.literal_eval(match["value"]))
    return {
        key: _effective(section, key, values)
        for section in _SECTIONS
        for (given_in, key), values in listed.items()
        if given_in == section and any(values)
    }


def _effective(section: str, key: str, values: list[str]) -> str:
    """Returns the value that counts where several files set one, which the list does not tell."""
    if len(set(values)) == 1:
        return values[0]
    return _pip_config("get", f"{section}.{key}").strip() or values[-1]


def _pip_config(*words: str) -> str:
    """Returns what ``pip config`` prints; it reads no archive and no index."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "--no-color", "--no-input", "config", *words],
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if run.returncode == 0:
        return run.stdout
    if "No module named pip" in run.stderr:
        reason = "this Python has no pip to ask; run 'python -m ensurepip'"
    else:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        reason = next(reversed(lines), "'pip config list' failed")
    raise SourceError(f"pip's configuration: {reason}")


def _address(location: str) -> str:
    """Returns a URL, also of a folder or page."""
    if "://" in location:
        return location
    return _path(location.removeprefix("file:")).absolute().as_uri()


def _path(text: str) -> Path:
    # Unlike Path.expanduser, this leaves the home of an unknown user as it stands.
    return Path(os.path.expanduser(text))  # noqa: PTH111


def _words(values: Mapping[str, str], key: str) -> tuple[str, ...]:
    return tuple(values.get(key, "").split())


def _number(values: Mapping[str, str], *keys: str, default: float) -> float:
    for key in keys:
        if key in values:
            try:
                return float(values[key])
            except ValueError:
                raise SourceError(
                    f"pip's configuration: {key} '{values[key]}' must be a number"
                ) from None
    return default


def _first_of(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
