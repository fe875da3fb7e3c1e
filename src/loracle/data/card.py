"""A dataset card: the files and the delimiter that its ``configs:`` give the ``train`` split.

The card only names files; they are read by our own readers, so that a file says the same whoever
names it. Source: huggingface.co/docs/hub, "Manual configuration" of data sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.errors import DataError
from loracle.sources.folders import DATA_CARD
from loracle.text import shortened

# What an entry may say besides the files and the delimiter, without a bearing on any text.
_IDLE = frozenset({"config_name", "default", "description", "version", "features", "data_dir"})
_DELIMITERS = ("sep", "delimiter")


@dataclass(frozen=True)
class CardFiles:
    """What a card says of the ``train`` split of its default configuration."""

    files: tuple[Path, ...] | None
    """Its files, in order; None: the card names none, but perhaps a folder."""
    folder: Path
    """The folder that the entry is about."""
    delimiter: str | None
    """Of CSV and TSV; None: by suffix."""


def read_card(folder: Path) -> CardFiles:
    """Returns what the card of a folder names; without one, no files and the folder itself.

    Raises:
        DataError: If the card cannot be followed, to the letter and within its folder.
    """
    configs = _configs(folder)
    if configs is None:
        return CardFiles(None, folder, None)
    entry = _default(configs, folder=folder)
    unknown = sorted(map(str, entry.keys() - {*_IDLE, *_DELIMITERS, "data_files"}))
    if unknown:
        raise _fault(folder, f"it sets '{unknown[0]}', which LoRAcle's readers do not know")
    delimiter = next((entry[key] for key in _DELIMITERS if key in entry), None)
    if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise _fault(folder, f"its delimiter is {delimiter!r}, not one character")
    base = _inside(folder, entry.get("data_dir") or ".")
    patterns = _train_patterns(entry.get("data_files"), folder=folder)
    files = None if patterns is None else _matching(patterns, base=base, folder=folder)
    return CardFiles(files, base, delimiter)


def _configs(folder: Path) -> object:
    """Returns the value of ``configs:`` in the card's front matter, or None."""
    import yaml

    card = folder / DATA_CARD
    if not card.is_file():
        return None
    text = card.read_text("utf-8-sig", "replace")
    front = re.match(r"---\s*\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
    if front is None or re.search(r"^configs:", front[1], re.MULTILINE) is None:
        return None
    try:
        tree = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        raise _fault(folder, f"broken YAML: {error}") from None
    return tree.get("configs") if isinstance(tree, Mapping) else None


def _default(configs: object, *, folder: Path) -> Mapping[Any, Any]:
    """Returns the only entry, or the one that is marked or named as the default."""
    if not isinstance(configs, list) or not all(isinstance(one, Mapping) for one in configs):
        raise _fault(folder, "configs is not a list of mappings")
    entries: list[Mapping[Any, Any]] = configs
    marked = [one for one in entries if one.get("default") is True]
    named = [one for one in entries if one.get("config_name") == "default"]
    chosen = entries if len(entries) == 1 else marked or named
    if len(chosen) != 1:
        names = ", ".join(str(one.get("config_name")) for one in entries)
        raise _fault(folder, f"it has {len(entries)} configurations ({names}) and no one default")
    return chosen[0]


def _train_patterns(data_files: object, *, folder: Path) -> list[str] | None:
    """Returns the file patterns of the ``train`` split; a card without splits means it."""
    if data_files is None:
        return None
    if isinstance(data_files, list) and any(isinstance(one, Mapping) for one in data_files):
        if not all(isinstance(one, Mapping) and {"split", "path"} <= {*one} for one in data_files):
            raise _fault(folder, "data_files has an entry without split and path")
        splits = [one["split"] for one in data_files]
        if len({*map(str, splits)}) < len(splits):
            raise _fault(folder, "data_files names a split twice")
        data_files = {one["split"]: one["path"] for one in data_files}
    if isinstance(data_files, Mapping):
        if "train" not in data_files:
            there = ", ".join(map(str, data_files)) or "none"
            raise _fault(folder, f"no split 'train' in it (there are {there})")
        data_files = data_files["train"]
    patterns = [data_files] if isinstance(data_files, str) else data_files
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise _fault(folder, f"{data_files!r} is no list of files")
    return patterns


def _matching(patterns: Iterable[str], *, base: Path, folder: Path) -> tuple[Path, ...]:
    files: dict[Path, None] = {}
    for pattern in patterns:
        _inside(folder, pattern)
        # A double star at the end stands for files at any depth, as on the hub.
        depth = re.sub(r"\*\*$", "**/*", pattern)
        try:
            found = sorted(path for path in base.glob(depth) if path.is_file())
        except ValueError as error:
            raise _fault(folder, str(error)) from None
        hidden = [path for path in found if path.relative_to(base).as_posix().startswith(".")]
        if len(found) == len(hidden):
            raise _fault(folder, f"no file matches '{pattern}'")
        files |= dict.fromkeys(path for path in found if path not in hidden)
    return tuple(files)


def _inside(folder: Path, path: object) -> Path:
    """Returns a path of the card, which must not lead out of its folder."""
    if not isinstance(path, str) or "://" in path or {"..", "/", "~"} & {*Path(path).parts}:
        raise _fault(folder, f"'{path}' is not in this folder")
    return folder / path


def _fault(folder: Path, reason: str) -> DataError:
    return DataError(
        f"{folder.name}: its dataset card cannot be followed ({shortened(reason)}); "
        f"name one file, e.g. path:{folder.name}/FILE"
    )
