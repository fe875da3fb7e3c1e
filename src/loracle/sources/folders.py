"""What a model or data folder must hold, and the hash of its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from loracle.errors import SourceError
from loracle.records.files import read_json
from loracle.sources.cache import sha256_file

# The files of a model folder that stock Transformers reads. Weights in safetensors only: the other
# formats can run code when they are loaded.
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
DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
# In any case: these patterns are matched by the letter, here and by the hub's client.
DATA_PATTERNS = tuple(
    "*" + "".join(f"[{char}{char.upper()}]" if char.isalpha() else char for char in suffix)
    for suffix in DATA_SUFFIXES
)
# Says which files are the training data, and how their cells are delimited.
DATA_CARD = "README.md"
# JSON that describes a data set and holds no records.
NOT_RECORDS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
DATA_IGNORED = (*NOT_RECORDS, ".*")

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def require_model_folder(folder: Path, *, name: str) -> None:
    """Checks that ``folder`` holds a model that stock Transformers loads without running its code.

    Raises:
        SourceError: Naming what is missing.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(f"{name}: no config.json in it; a model folder has one")
    if not any((folder / tokenizer).is_file() for tokenizer in _TOKENIZERS):
        raise SourceError(f"{name}: no tokenizer in it ({', '.join(_TOKENIZERS[:2])})")
    index = folder / "model.safetensors.index.json"
    weights = [path.name for path in model_files(folder) if path.suffix == ".safetensors"]
    if not weights:
        raise SourceError(
            f"{name}: no *.safetensors weights in it; LoRAcle loads no other format, since others "
            "can run code: convert it, or name another model"
        )
    if index.is_file() and not (folder / "model.safetensors").is_file():
        tree = read_json(index, origin=f"{name}/{index.name}", fault=SourceError)
        missing = sorted(set(tree.get("weight_map", {}).values()) - set(weights))
        if missing:
            raise SourceError(f"{name}: {len(missing)} of its weight files missing ({missing[0]})")


def model_files(folder: Path) -> list[Path]:
    """Returns the files of a model folder that Transformers reads, by name."""
    return _matching(folder.iterdir(), MODEL_PATTERNS, ignored=MODEL_IGNORED)


def require_data_files(folder: Path, *, name: str) -> list[Path]:
    """Returns the data files under a folder, by path.

    Raises:
        SourceError: If there is none.
    """
    names = data_files(folder)
    if not names:
        raise SourceError(f"{name}: no {', '.join(DATA_SUFFIXES)} file in it")
    return [folder / name for name in names]


def data_files(folder: Path) -> list[Path]:
    """Returns the names of the data files below a folder, in order, hidden ones left out."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        name
        for name in names
        if name.suffix.lower() in DATA_SUFFIXES
        and name.name.lower() not in NOT_RECORDS
        and not any(part.startswith(".") for part in name.parts)
    ]


def content_revision(path: Path, *, files: Iterable[Path]) -> str:
    """Returns ``sha256:<hex>`` of a file, or of the names and contents of a folder's ``files``."""
    if path.is_file():
        return f"sha256:{sha256_file(path)}"
    digest = hashlib.sha256()
    for file in files:
        # A name on the disk need not be UTF-8.
        digest.update(os.fsencode(file.relative_to(path)) + f"\0{sha256_file(file)}\n".encode())
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
