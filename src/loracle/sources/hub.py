"""``hub:`` sources: model-hub repositories through its own client and cache, pinned by commit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loracle.errors import SourceError
from loracle.records.files import disk_reason, read_json
from loracle.sources import folders
from loracle.sources.cache import Progress
from loracle.sources.catalog import Kind
from loracle.sources.spec import HubSource, ResolvedSource
from loracle.text import GIB

# A catalog model without gated access.
_UNGATED = "tinyllama-1.1b"


def resolve_hub_model(source: HubSource, *, progress: Progress) -> ResolvedSource:
    """Returns the folder of a model repository.

    Raises:
        SourceError: No route, no access, not found, or not a model in safetensors.
    """
    progress(f"looking up {_named(source)}")
    with _hub_faults(source, kind="model"):
        _require_disk(source)
        folder = Path(_snapshot(source, kind="model"))
    folders.require_model_folder(folder, name=_named(source))
    return ResolvedSource(folder, source.canonical, folder.name)


def resolve_hub_data(source: HubSource, *, progress: Progress) -> ResolvedSource:
    """Returns the data file of a data-set repository, or the folder if there are several.

    Raises:
        SourceError: No route, no access, not found, or no data file.
    """
    progress(f"looking up {_named(source)}")
    with _hub_faults(source, kind="data"):
        folder = Path(_snapshot(source, kind="data"))
    files = folders.require_data_files(folder, name=_named(source))
    path = files[0] if len(files) == 1 else folder
    return ResolvedSource(path, source.canonical, folder.name)


def hub_architecture(source: HubSource) -> dict[str, Any]:
    """Returns the ``config.json`` of a model repository; nothing else of it is downloaded.

    Raises:
        SourceError: No route, no access, not found, or not a model.
    """
    import huggingface_hub

    with _hub_faults(source, kind="model"):
        path = huggingface_hub.hf_hub_download(source.repo, "config.json", revision=source.revision)
    return read_json(Path(path), origin=f"{_named(source)}/config.json", fault=SourceError)


def _require_disk(source: HubSource) -> None:
    """Checks that the files still to be downloaded fit on the disk.

    Checks nothing if the hub cannot be reached: the download reports that.

    Raises:
        SourceError: If there is not enough room.
    """
    from huggingface_hub import constants, errors

    try:
        files = _snapshot(source, kind="model", dry_run=True)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.DryRunError):
        return
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SourceError(
            f"{_named(source)}: the download needs {needed / GIB:.1f} GiB, and {free / GIB:.1f} "
            "GiB are free in the hub's cache; free some space, or set HF_HOME to another disk"
        )


def _snapshot(source: HubSource, *, kind: Kind, **options: Any) -> Any:
    """Returns the snapshot folder, named after its commit; with ``dry_run`` a list of its files.

    Without a route the client returns its cached snapshot, and raises if that is partial.
    """
    import huggingface_hub

    is_model = kind == "model"
    return huggingface_hub.snapshot_download(
        source.repo,
        repo_type="model" if is_model else "dataset",
        revision=source.revision,
        allow_patterns=list(
            folders.MODEL_PATTERNS if is_model else (*folders.DATA_PATTERNS, folders.DATA_CARD)
        ),
        ignore_patterns=list(folders.MODEL_IGNORED if is_model else folders.DATA_IGNORED),
        **options,
    )


def _named(source: HubSource) -> str:
    return f"{source.canonical}@{source.revision}"


@contextmanager
def _hub_faults(source: HubSource, *, kind: Kind) -> Iterator[None]:
    """Turns the client's errors into a ``SourceError``.

    Raises:
        SourceError: For any fault of the network, the account, the name or the disk.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, RuntimeError, OSError) as error:
        # RuntimeError: hf_xet, which transfers large files, raises nothing more specific.
        raise SourceError(f"{_named(source)}: {_reason(error, source, kind=kind)}") from error


def _reason(error: Exception, source: HubSource, *, kind: Kind) -> str:
    """Returns the fault and its remedy, never an address, which may contain a token."""
    from huggingface_hub import errors

    noun = "model" if kind == "model" else "data set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    # In order: GatedRepoError is a RepositoryNotFoundError, and most are OSErrors.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, _gated(source, noun=noun)),
        (
            errors.RepositoryNotFoundError,
            f"no such {noun} repository on the hub, or a private one ('hf auth login' or HF_TOKEN)",
        ),
        (errors.RevisionNotFoundError, f"no revision '{source.revision}' in this repository"),
        (errors.DisabledRepoError, "the hub has disabled this repository"),
        (errors.RemoteEntryNotFoundError, f"no config.json in it: not a {noun} for Transformers"),
        (
            errors.LocalEntryNotFoundError,
            "no route to the hub, and not in its cache; check the network and HF_HUB_OFFLINE",
        ),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids access to the hub"),
        (errors.HfHubHTTPError, f"the hub answered with HTTP status {status}"),
        (errors.HTTPError, "no route to the hub; check the network"),
        (errors.HFValidationError, "not a valid repository name"),
        (RuntimeError, "the download broke off; run the command again to resume it"),
    )
    for kind_of_error, reason in reasons:
        if isinstance(error, kind_of_error):
            return reason
    assert isinstance(error, OSError)
    return disk_reason(error)


def _gated(source: HubSource, *, noun: str) -> str:
    alternative = f"; {_UNGATED} needs no access" if noun == "model" else ""
    return (
        f"gated, and this machine has no access: accept its terms on the page of {source.repo}, "
        f"then run 'hf auth login' or set HF_TOKEN{alternative}"
    )
