"""Data files as rows: JSON, JSON Lines, CSV, TSV and Parquet, read strictly.

A file that breaks its own format is an error with its position. A row that is merely no record is
dropped and counted (``Drop``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracle.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# Rows of a column in memory at a time; assumed.
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class Drop:
    """A dropped row and the reason."""

    row: int
    """Row or line number in the source, from 1."""
    reason: str
    """A short snake_case word, e.g. ``missing_output``."""


@dataclass(frozen=True)
class Table:
    """The rows of a source, their values not yet checked."""

    columns: tuple[str, ...]
    """All columns, in order of appearance."""
    rows: tuple[tuple[int, Mapping[str, Any]], ...]
    """Row or line number from 1, and the fields of the row."""
    drops: tuple[Drop, ...]
    """Rows without fields."""
    unread: Mapping[str, Sequence[int]]
    """Rows that say something in a column that is not needed, by column."""
    doubled: tuple[int, ...] = ()
    """Rows that give one key two values, of which the last counts."""
    files: tuple[tuple[str, int], ...] = ()
    """Files that were read, in order, and the rows of each."""
    others: tuple[str, ...] = ()
    """Data files of the same folder that were not read."""


def read_table(path: Path, *, columns: Collection[str], delimiter: str | None = None) -> Table:
    """Returns the rows of one data file, in the format of its suffix.

    Rows are numbered by line in JSON Lines, CSV and TSV (where the row starts), and by position
    from 1 in JSON and Parquet.

    Args:
        path: The file.
        columns: Columns whose values are needed; the rows hold no others.
        delimiter: Between the cells of CSV and TSV; None: a comma, and a tab.

    Raises:
        DataError: If the file is missing, of another format, or broken.
        OSError: If the system refuses to read it.
    """
    if not path.is_file():
        folder = path.parent
        siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise DataError(f"{path.name}: no such file{did_you_mean(path.name, siblings)}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        given = f"suffix '{path.suffix}'" if path.suffix else "no suffix"
        raise DataError(f"{path.name}: {given}; must be one of {', '.join(READERS)}")
    table = reader(path, columns, delimiter)
    return replace(table, files=((path.name, len(table.rows) + len(table.drops)),))


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "; it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{path.name}:{line}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}){hint}"
        ) from None


def _read_json(path: Path, columns: Collection[str], _delimiter: str | None) -> Table:
    text = _read_text(path)
    if not text.strip():
        return _table([], wanted=columns)
    if _is_json_lines(text):
        return _json_lines(text, path=path, wanted=columns)
    value = _parse_json(text, path=path)
    rows = value if isinstance(value, list) else [value]
    return _table(enumerate(rows, start=1), wanted=columns)


def _is_json_lines(text: str) -> bool:
    """Returns True if the first non-blank line is a complete object followed by more text."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _read_json_lines(path: Path, columns: Collection[str], _delimiter: str | None) -> Table:
    return _json_lines(_read_text(path), path=path, wanted=columns)


def _json_lines(text: str, *, path: Path, wanted: Collection[str]) -> Table:
    # Not str.splitlines: U+2028 and its like may stand unescaped inside a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    values = (
        (number, _parse_json(line, path=path, first_line=number))
        for number, line in lines
        if line.strip()
    )
    return _table(values, wanted=wanted)


def _parse_json(text: str, *, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise DataError(
            f"{path.name}:{line}:{error.colno}: broken JSON ({error.msg} at line {line}, "
            f"column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}:{first_line}: JSON that cannot be read ({error})") from None


class _Doubled(dict[str, Any]):
    """The fields of an object that gave one key two values."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs) and any(fields[key] != value for key, value in pairs):
        return _Doubled(fields)
    return fields


def _table(values: Iterable[tuple[int, Any]], *, wanted: Collection[str]) -> Table:
    """Returns a table of the wanted columns, and where the others say something."""
    rows: list[tuple[int, Mapping[str, Any]]] = []
    drops: list[Drop] = []
    doubled: list[int] = []
    columns: dict[str, None] = {}
    unread: dict[str, list[int]] = {}
    for number, value in values:
        if not isinstance(value, Mapping):
            drops.append(Drop(number, "not_an_object"))
            continue
        if isinstance(value, _Doubled):
            doubled.append(number)
        columns |= dict.fromkeys(value)
        for name in value:
            if name not in wanted and _says_something(value[name]):
                unread.setdefault(name, []).append(number)
        rows.append((number, {name: value[name] for name in wanted if name in value}))
    in_order = {name: unread[name] for name in columns if name in unread}
    return Table(tuple(columns), tuple(rows), tuple(drops), in_order, tuple(doubled))


def _says_something(value: object) -> bool:
    """Returns False for null, blank text, and empty lists and objects."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value not in ([], {})


def _read_delimited(path: Path, columns: Collection[str], delimiter: str | None) -> Table:
    text = _read_text(path)
    by_suffix = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter or by_suffix, strict=True
    )
    numbered: list[tuple[int, list[str]]] = []
    start = 1
    # A cell may be as long as the file; the limit is one for the whole process.
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        for cells in reader:
            if cells:
                numbered.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name}:{start}: broken row that starts here ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return _with_header(numbered, columns, path=path)


def _with_header(
    numbered: list[tuple[int, list[str]]], wanted: Collection[str], *, path: Path
) -> Table:
    if not numbered:
        return _table([], wanted=wanted)
    (line, columns), *body = numbered
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise DataError(f"{path.name}:{line}: column '{repeated[0]}' is named twice")
    complete = [(number, cells) for number, cells in body if len(cells) == len(columns)]
    broken = [number for number, cells in body if len(cells) != len(columns)]
    fields = ((number, dict(zip(columns, cells, strict=True))) for number, cells in complete)
    return replace(
        _table(fields, wanted=wanted),
        columns=tuple(columns),
        drops=tuple(Drop(number, "wrong_field_count") for number in broken),
    )


def _read_parquet(path: Path, columns: Collection[str], _delimiter: str | None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = tuple(file.schema_arrow.names)
            table = file.read(columns=[name for name in names if name in columns])
            unread = {name: _filled(file, name) for name in names if name not in columns}
        rows = tuple(enumerate(table.to_pylist(), start=1))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path.name}: Parquet that cannot be read ({reason})") from None
    in_use = {name: filled for name, filled in unread.items() if filled}
    return Table(names, rows, drops=(), unread=in_use)


def _filled(file: pq.ParquetFile, column: str) -> list[int]:
    """Returns the rows that say something in one column, read in pieces."""
    filled: list[int] = []
    start = 1
    for batch in file.iter_batches(columns=[column], batch_size=_PARQUET_ROWS):
        values = batch.column(0)
        filled += (
            start + index for index, value in enumerate(values) if _says_something(value.as_py())
        )
        start += len(batch)
    return filled


READERS: Mapping[str, Callable[[Path, Collection[str], str | None], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".parquet": _read_parquet,
}
"""Readers by file suffix."""
