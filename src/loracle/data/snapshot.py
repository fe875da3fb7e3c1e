"""A folder as rows: its only data file, its ``train`` files, or the files that its card names.

The names that count as ``train`` follow the Hugging Face Hub's convention (huggingface.co/docs/hub,
"File names and splits"): the word in a file or folder name, set off by anything but letters.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Collection
from pathlib import Path

from loracle.data.rows import READERS, Table, read_table
from loracle.errors import DataError

_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
# Files that `datasets` writes beside the data, with a suffix of data.
_NOT_DATA = frozenset({"dataset_infos.json", "dataset_info.json", "state.json"})


def read_folder(folder: Path, *, columns: Collection[str]) -> Table:
    """Returns the rows of the training data in ``folder``.

    A dataset card (``README.md``) that maps files to configurations is followed, by the
    ``datasets`` library. Without one: the only data file, or else the files named ``train``, shards
    in the order of their names. Rows of several files are numbered through, from 1.

    Raises:
        DataError: If there is no data file, several and no rule to choose, or one is broken.
        OSError: If the system refuses to read them.
    """
    if _card_maps_files(folder):
        return _read_by_card(folder)
    files = _train_files(folder)
    if len(files) == 1:
        return read_table(files[0], columns=columns)
    return _join([read_table(file, columns=columns) for file in files])


def _train_files(folder: Path) -> list[Path]:
    """Returns the data files to read, in order."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    data = [
        name
        for name in names
        if name.suffix.lower() in READERS
        and name.name not in _NOT_DATA
        and not any(part.startswith(".") for part in name.parts)
    ]
    if not data:
        raise DataError(f"{folder.name}: no data file in this folder ({', '.join(READERS)})")
    chosen = data if len(data) == 1 else [name for name in data if _TRAIN.search(str(name))]
    if not chosen or len({name.suffix.lower() for name in chosen}) > 1:
        listed = ", ".join(map(str, data[:5])) + (", ..." if len(data) > 5 else "")
        raise DataError(
            f"{folder.name}: {len(data)} data files and no telling which to use ({listed}); "
            f"name one, e.g. path:{folder.name}/{(chosen or data)[0]}"
        )
    return [folder / name for name in chosen]


def _join(tables: list[Table]) -> Table:
    """Returns one table with consecutive row numbers."""
    rows, drops = [], []
    offset = 0
    for table in tables:
        order = sorted([*(row for row, _ in table.rows), *(drop.row for drop in table.drops)])
        position = {row: offset + index for index, row in enumerate(order, start=1)}
        rows += [(position[row], fields) for row, fields in table.rows]
        drops += [type(drop)(position[drop.row], drop.reason) for drop in table.drops]
        offset += len(order)
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    return Table(columns=tuple(columns), rows=tuple(rows), drops=tuple(drops))


def _card_maps_files(folder: Path) -> bool:
    card = folder / "README.md"
    if not card.is_file():
        return False
    front = re.match(r"---\s*\n(.*?)^---", card.read_text("utf-8", "replace"), re.S | re.M)
    return front is not None and re.search(r"^configs:", front[1], re.MULTILINE) is not None


def _read_by_card(folder: Path) -> Table:
    """Returns the ``train`` split that the folder's card names, streamed and without a cache."""
    import datasets
    import pyarrow as pa
    import yaml

    # TypeError and KeyError too: a card of the wrong shape reaches the library's code unchecked.
    expected = (
        *(datasets.exceptions.DatasetsError, pa.ArrowException, yaml.YAMLError),
        *(OSError, ValueError, TypeError, KeyError),
    )
    with tempfile.TemporaryDirectory() as cache:
        try:
            split = datasets.load_dataset(
                str(folder.resolve()), split="train", streaming=True, cache_dir=cache
            )
            rows = tuple(enumerate(split, start=1))
        except expected as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise DataError(
                f"{folder.name}: its dataset card cannot be followed ({reason}); "
                f"name one file, e.g. path:{folder.name}/FILE"
            ) from None
    columns = dict.fromkeys(name for _, fields in rows for name in fields)
    return Table(columns=tuple(columns), rows=rows, drops=())
