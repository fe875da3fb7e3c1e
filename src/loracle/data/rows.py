"""Data files as rows: JSON, JSON Lines, CSV, TSV and Parquet, read strictly.

A file that breaks its own format is an error with its position. A row that is merely no record is
dropped and counted (``Drop``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.errors import DataError, did_you_mean


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


def read_table(path: Path, *, columns: Collection[str]) -> Table:
    """Returns the rows of one data file, in the format of its suffix.

    Rows are numbered by line in JSON Lines, CSV and TSV (where the row starts), and by position
    from 1 in JSON and Parquet.

    Args:
        path: The file.
        columns: Columns whose values are needed; Parquet reads no others.

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
    return reader(path, columns)


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


def _read_json(path: Path, _columns: Collection[str]) -> Table:
    text = _read_text(path)
    if not text.strip():
        return _table([])
    if _is_json_lines(text):
        return _json_lines(text, path=path)
    value = _parse_json(text, path=path)
    return _table(enumerate(value if isinstance(value, list) else [value], start=1))


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


def _read_json_lines(path: Path, _columns: Collection[str]) -> Table:
    return _json_lines(_read_text(path), path=path)


def _json_lines(text: str, *, path: Path) -> Table:
    # Not str.splitlines: U+2028 and its like may stand unescaped inside a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    return _table(
        [
            (number, _parse_json(line, path=path, first_line=number))
            for number, line in lines
            if line.strip()
        ]
    )


def _parse_json(text: str, *, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise DataError(
            f"{path.name}:{line}:{error.colno}: broken JSON ({error.msg} at line {line}, "
            f"column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}:{first_line}: JSON that cannot be read ({error})") from None


def _table(values: Iterable[tuple[int, Any]]) -> Table:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    drops: list[Drop] = []
    for number, value in values:
        if isinstance(value, Mapping):
            rows.append((number, value))
        else:
            drops.append(Drop(number, "not_an_object"))
    columns = dict.fromkeys(name for _, fields in rows for name in fields)
    return Table(columns=tuple(columns), rows=tuple(rows), drops=tuple(drops))


def _read_delimited(path: Path, _columns: Collection[str]) -> Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    numbered: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for cells in reader:
            numbered.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name}:{start}: broken row that starts here ({error})") from None
    return _with_header([(line, cells) for line, cells in numbered if cells], path=path)


def _with_header(numbered: list[tuple[int, list[str]]], *, path: Path) -> Table:
    if not numbered:
        return _table([])
    (line, columns), *body = numbered
    repeated = [name for name in columns if columns.count(name) > 1]
    if repeated:
        raise DataError(f"{path.name}:{line}: column '{repeated[0]}' is named twice")
    complete = [(number, cells) for number, cells in body if len(cells) == len(columns)]
    broken = [number for number, cells in body if len(cells) != len(columns)]
    return Table(
        columns=tuple(columns),
        rows=tuple((number, dict(zip(columns, cells, strict=True))) for number, cells in complete),
        drops=tuple(Drop(number, "wrong_field_count") for number in broken),
    )


def _read_parquet(path: Path, columns: Collection[str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = tuple(file.schema_arrow.names)
            table = file.read(columns=[name for name in names if name in columns])
        rows = tuple(enumerate(table.to_pylist(), start=1))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path.name}: Parquet that cannot be read ({reason})") from None
    return Table(columns=names, rows=rows, drops=())


READERS: Mapping[str, Callable[[Path, Collection[str]], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".parquet": _read_parquet,
}
"""Readers by file suffix."""
