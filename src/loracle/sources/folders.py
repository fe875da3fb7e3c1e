"""What a model or data folder must hold, and the hash of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loracle.errors import SourceError
from loracle.sources.cache import sha256_file

# What stock Transformers reads of a model folder. Weights in safetensors only: the other formats
# can run code when they are loaded.
MODEL_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
# A second copy of the weights under other tensor names, as some repositories carry it.
MODEL_IGNORED = ("*/*", "consolidated*")
DATA_PATTERNS = ("*.parquet", "*.jsonl", "*.json", "*.csv")
# JSON that describes a data set and is none.
DATA_IGNORED = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", ".*")

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def require_model_folder(folder: Path, *, name: str) -> None:
    """Returns if ``folder`` holds a model that stock Transformers loads without running its code.

    Raises:
        SourceError: Naming what is missing.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(f"{name}: no config.json in it; a model folder has one")
    _require_weights(folder, name=name)
    if not any((folder / tokenizer).is_file() for tokenizer in _TOKENIZERS):
        raise SourceError(f"{name}: no tokenizer in it ({', '.join(_TOKENIZERS[:2])})")


def _require_weights(folder: Path, *, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    weights = [path.name for path in model_files(folder) if path.suffix == ".safetensors"]
    if not weights:
        raise SourceError(
            f"{name}: no *.safetensors weights in it; LoRAcle loads nothing else, since other "
            "formats can run code: convert it, or name another model"
        )
    if index.is_file() and not (folder / "model.safetensors").is_file():
        shards = set(read_json(index, name=f"{name}/{index.name}").get("weight_map", {}).values())
        missing = sorted(shards - set(weights))
        if missing:
            raise SourceError(f"{name}: {len(missing)} of its weight files missing ({missing[0]})")


def read_json(path: Path, *, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        SourceError: If it cannot be read or is no JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{name}: not readable as JSON ({reason})") from None
    if not isinstance(tree, dict):
        raise SourceError(f"{name}: must hold a JSON object, holds a {type(tree).__name__}")
    return tree


def model_files(folder: Path) -> list[Path]:
    """Returns the files of a model folder that Transformers reads, by name."""
    return _matching(folder.iterdir(), MODEL_PATTERNS, ignored=MODEL_IGNORED)


def data_files(folder: Path) -> list[Path]:
    """Returns the data files under a folder, by path."""
    return _matching(folder.rglob("*"), DATA_PATTERNS, ignored=DATA_IGNORED)


def require_data_files(folder: Path, *, name: str) -> list[Path]:
    """Returns the data files under a folder.

    Raises:
        SourceError: If there is none.
    """
    files = data_files(folder)
    if not files:
        raise SourceError(f"{name}: no .parquet, .jsonl, .json or .csv file in it")
    return files


def content_revision(path: Path, *, files: Iterable[Path]) -> str:
    """Returns ``sha256:<hex>`` of a file, or of the names and contents of a folder's ``files``."""
    if path.is_file():
        return f"sha256:{sha256_file(path)}"
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _matching(
    paths: Iterable[Path], patterns: tuple[str, ...], *, ignored: tuple[str, ...]
) -> list[Path]:
    return sorted(
        path
        for path in paths
        if _matches(path.name, patterns) and not _matches(path.name, ignored) and path.is_file()
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
