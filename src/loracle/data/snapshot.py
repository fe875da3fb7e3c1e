"""A folder as rows: its only data file, its ``train`` files, or the files that its card names.

The names that count as ``train`` follow the Hugging Face Hub's convention (huggingface.co/docs/hub,
"File names and splits"): the word in a file or folder name, set off by anything but letters.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from loracle.data.card import read_card
from loracle.data.rows import READERS, Drop, Table, read_table
from loracle.errors import DataError
from loracle.sources.folders import data_files

_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)


def read_folder(folder: Path, *, columns: Collection[str]) -> Table:
    """Returns the rows of the training data in ``folder``.

    A dataset card (``README.md``) that maps files to configurations is followed. Without one: the
    only data file, or else the files named ``train``, shards in the order of their names. Rows of
    several files are numbered through, from 1.

    Raises:
        DataError: If there is no data file, several and no rule to choose, or one is broken.
        OSError: If the system refuses to read them.
    """
    card = read_card(folder)
    files = _train_files(card.folder) if card.files is None else card.files
    tables = [read_table(file, columns=columns, delimiter=card.delimiter) for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    others = [name.as_posix() for name in data_files(folder) if name.as_posix() not in names]
    table = tables[0] if len(tables) == 1 else _join(tables)
    counts = [len(one.rows) + len(one.drops) for one in tables]
    return replace(table, files=tuple(zip(names, counts, strict=True)), others=tuple(others))


def _train_files(folder: Path) -> list[Path]:
    """Returns the data files to read, in order."""
    data = data_files(folder)
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
    rows, drops, doubled = [], [], []
    unread: dict[str, list[int]] = {}
    offset = 0
    for table in tables:
        order = sorted([*(row for row, _ in table.rows), *(drop.row for drop in table.drops)])
        position = {row: offset + index for index, row in enumerate(order, start=1)}
        rows += [(position[row], fields) for row, fields in table.rows]
        drops += [Drop(position[drop.row], drop.reason) for drop in table.drops]
        doubled += [position[row] for row in table.doubled]
        for name, filled in table.unread.items():
            unread.setdefault(name, []).extend(position[row] for row in filled)
        offset += len(order)
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    return Table(
        columns=tuple(columns),
        rows=tuple(rows),
        drops=tuple(drops),
        doubled=tuple(doubled),
        unread=unread,
    )
