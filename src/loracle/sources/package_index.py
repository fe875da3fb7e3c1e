"""Downloads a pinned wheel or sdist from the package index; nothing in it is built or executed."""

from __future__ import annotations

import hashlib
import logging
import re
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loracle.errors import SourceError, did_you_mean
from loracle.sources.pip_settings import PipSettings, read_pip_settings
from loracle.sources.spec import PypiSource

if TYPE_CHECKING:
    import httpx2
    from unearth import Link, Package, PackageFinder
    from unearth.fetchers import PyPIClient

T = TypeVar("T")

# source (pip): before the first new attempt; each further one waits twice as long.
_FIRST_PAUSE_S = 0.25
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")
# An index that does not have the project answers so.
_ABSENT = "Client Error(404)"


@dataclass
class _Findings:
    """What was seen on the way, for the reason if nothing fits."""

    versions: set[str] = field(default_factory=set)
    digests: list[str] = field(default_factory=list)
    """Of the version's files that are not the pinned one."""
    faults: list[str] = field(default_factory=list)


def fetch_archive(source: PypiSource, *, scratch: Path) -> Path:
    """Returns the pinned wheel or sdist, downloaded into ``scratch``.

    Looks where pip would (find-links, index, extra indexes) and takes the file of the version that
    has the hash, whatever its format and platform; a yanked one too, since it is pinned.

    Raises:
        SourceError: No route to the index, no such project or version, or another hash.
        OSError: Full disk or no permission.
    """
    settings, seen = read_pip_settings(), _Findings()
    with _warnings_to(seen.faults), _client(settings) as client:
        for link in _links(source, settings, client, seen):
            archive = scratch / str(link.filename)
            fetch = partial(_download, client, link, archive)
            digest = _attempt(fetch, retries=settings.retries, faults=seen.faults)
            if digest == source.sha256:
                return archive
            seen.digests += [digest] if digest else []
    raise SourceError(f"{source.canonical}: {_reason(source, seen)}")


def _links(
    source: PypiSource, settings: PipSettings, client: PyPIClient, seen: _Findings
) -> Iterator[Link]:
    """Yields the files of the version that are listed with the hash, or without any."""
    for finder in _finders(settings, client):
        search = partial(_search, finder, source.project)
        packages = _attempt(search, retries=settings.retries, faults=seen.faults) or []
        seen.versions |= {str(package.version) for package in packages}
        links = [p.link for p in packages if _is_version(str(p.version), source.version)]
        for link in sorted(links, key=lambda link: _listed_sha256(link) is None):
            listed = _listed_sha256(link)
            if listed in (None, source.sha256):
                yield link
            else:
                seen.digests.append(listed)


def _finders(settings: PipSettings, client: PyPIClient) -> Iterator[PackageFinder]:
    """Yields one finder per location, so that one that fails does not hide the others."""
    from unearth import PackageFinder

    for location in settings.find_links:
        yield PackageFinder(client, find_links=[location], ignore_compatibility=True)
    for url in _index_urls(settings):
        yield PackageFinder(client, index_urls=[url], ignore_compatibility=True)


def _index_urls(settings: PipSettings) -> list[str]:
    from unearth import PackageFinder

    if settings.no_index:
        return []
    # Without an index given, the library takes the same one as pip.
    default = PackageFinder().sources[0]["url"]
    return [settings.index_url or default, *settings.extra_index_urls]


def _search(finder: PackageFinder, project: str) -> list[Package]:
    try:
        return list(finder.find_all_packages(project, allow_yanked=True))
    except OSError as error:  # a local folder or page; the disk of the cache is not in play
        raise ValueError(f"{finder.sources[0]['url']}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError) as error:  # JSON of another shape
        raise ValueError(f"{finder.sources[0]['url']}: not a page of an index") from error


def _is_version(listed: str, version: str) -> bool:
    from packaging.specifiers import InvalidSpecifier, Specifier

    try:
        return Specifier(f"=={version}").contains(listed, prereleases=True)
    except InvalidSpecifier:
        return False


def _listed_sha256(link: Link) -> str | None:
    listed: str | None = (link.hash_option or {}).get("sha256", [None])[0]
    return listed


def _download(client: PyPIClient, link: Link, archive: Path) -> str:
    """Writes the archive as the server has it, and returns its SHA-256 as hex."""
    digest = hashlib.sha256()
    # An archive is what it is: a server must not wrap it in a compression of its own.
    plain = {"Accept-Encoding": "identity"}
    with (
        client.get_stream(link.url_without_fragment, headers=plain) as response,
        archive.open("wb") as file,
    ):
        response.raise_for_status()
        for chunk in response.iter_raw():
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _attempt(call: Callable[[], T], *, retries: int, faults: list[str]) -> T | None:
    """Returns what ``call`` returns, tried again after a failure of the network; None: no use."""
    import httpx2

    fault = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            return call()
        except httpx2.TransportError as error:
            fault = (
                f"no route to the package index ({str(error) or type(error).__name__}); "
                "check the network, or pip's index-url and proxy"
            )
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            fault = f"the package index could not be read: {error}"
            break
    faults.append(fault)
    return None


@contextmanager
def _warnings_to(faults: list[str]) -> Iterator[None]:
    """Collects what the library would print: locations that it skips, and why."""

    class _Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if _ABSENT not in record.getMessage():
                faults.append(record.getMessage())

    logger, collector = logging.getLogger("unearth"), _Collector(logging.WARNING)
    was_propagated, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
        logger.propagate = was_propagated


def _client(settings: PipSettings) -> PyPIClient:
    import httpx2
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    try:
        return PyPIClient(
            trusted_hosts=settings.trusted_hosts,
            mounts={f"all://{host}": _unchecked(host, settings) for host in settings.trusted_hosts},
            verify=_certificates(settings),
            proxy=settings.proxy,
            timeout=settings.timeout_s,
            follow_redirects=True,
            auth=MultiDomainBasicAuth(prompting=False, index_urls=_index_urls(settings)),
        )
    except (ValueError, ImportError, httpx2.InvalidURL) as error:  # ImportError: SOCKS
        reason = _CREDENTIALS.sub("", str(error))
        raise SourceError(f"pip's configuration: proxy or trusted-host: {reason}") from error


def _unchecked(host: str, settings: PipSettings) -> httpx2.HTTPTransport:
    """Returns the way to a trusted host: through the proxy, if any, with any certificate."""
    import httpx2

    proxy = settings.proxy
    if proxy is None and not urllib.request.proxy_bypass(host):
        proxies = urllib.request.getproxies()
        proxy = proxies.get("https") or proxies.get("all")
    return httpx2.HTTPTransport(verify=False, proxy=proxy)


def _certificates(settings: PipSettings) -> ssl.SSLContext:
    import httpx2

    bundle, client = settings.certificates, settings.client_certificate
    try:
        if bundle is None:
            context = httpx2.create_ssl_context()
        elif bundle.is_dir():
            context = ssl.create_default_context(capath=bundle)
        else:
            context = ssl.create_default_context(cafile=bundle)
        if client:
            context.load_cert_chain(client)
    except OSError as error:
        given = " and ".join(str(path) for path in (bundle, client) if path)
        reason = error.strerror or error
        raise SourceError(f"pip's configuration: cert {given}: {reason}") from error
    return context


def _reason(source: PypiSource, seen: _Findings) -> str:
    """Returns in one line why no file fits."""
    from packaging.version import Version

    faults = [_CREDENTIALS.sub("", " ".join(fault.split())) for fault in seen.faults]
    if seen.digests:
        reason = (
            f"hash mismatch: pinned sha256 {source.sha256}, the package index has "
            f"{seen.digests[0]}; nothing was extracted"
        )
    elif any(_is_version(version, source.version) for version in seen.versions):
        reason = f"version {source.version} is listed, but could not be downloaded"
    elif seen.versions:
        newest = sorted(seen.versions, key=Version)
        hint = did_you_mean(source.version, newest)
        reason = (
            f"no version {source.version} on the package index "
            f"(newest: {', '.join(newest[-3:])}){hint}"
        )
    elif faults:
        return faults[0]
    else:
        reason = f"the package index has no project '{source.project}'"
    return "; ".join((reason, *faults[:1]))
