"""Alpaca records: an instruction, an optional input, and the response to learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.config.run import ColumnsConfig
from loracle.data.rows import Drop, Table, read_table
from loracle.data.snapshot import read_folder
from loracle.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Record:
    """One usable row."""

    row: int
    """Row or line number in the source, from 1."""
    instruction: str
    """The instruction; never blank."""
    input: str
    """The input of the instruction; empty if there is none."""
    output: str
    """The response to learn; never blank."""


@dataclass(frozen=True)
class Reading:
    """What a source holds, and what of it is not used."""

    records: tuple[Record, ...]
    """Usable rows, in source order."""
    drops: tuple[Drop, ...]
    """Rows left out, in source order."""
    unread: Mapping[str, Sequence[int]]
    """Rows that say something in a column that is not read, by column."""
    doubled: tuple[int, ...]
    """Rows that give one key two values, of which the last counts."""
    files: tuple[tuple[str, int], ...]
    """Files that were read, in order, and the rows of each."""
    others: tuple[str, ...]
    """Data files of the same folder that were not read."""


def read_records(path: Path, *, columns: ColumnsConfig) -> tuple[list[Record], list[Drop]]:
    """Returns the usable records of a source in order, and the rows left out; see ``read_source``.

    Raises:
        DataError: If the source cannot be read, lacks a column, or has no usable row.
    """
    reading = read_source(path, columns=columns)
    return list(reading.records), list(reading.drops)


def read_source(path: Path, *, columns: ColumnsConfig) -> Reading:
    """Returns the usable records of a file or folder, and what of the source is not used.

    Reasons to leave out a row: ``not_an_object``, ``wrong_field_count`` (CSV),
    ``missing_instruction``, ``missing_output``, ``empty_instruction``, ``empty_output``,
    ``not_text`` (a number, a list), ``not_unicode`` (half a surrogate pair). An input that is null,
    absent or blank is empty.

    Raises:
        DataError: If the source cannot be read, lacks a column, or has no usable row.
    """
    fields = (columns.instruction, columns.input, columns.output)
    names = [name for name in fields if name is not None]
    try:
        table = (read_folder if path.is_dir() else read_table)(path, columns=names)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror or error})") from None
    if table.columns:
        _check_columns(table, columns=columns, origin=path.name)
    if not table.rows and not table.drops:
        raise DataError(f"{path.name}: empty, no records in it")
    results = [_record(row, fields, columns=columns) for row, fields in table.rows]
    records = tuple(result for result in results if isinstance(result, Record))
    drops = [*table.drops, *(result for result in results if isinstance(result, Drop))]
    drops.sort(key=lambda drop: drop.row)
    if not records:
        reasons = ", ".join(f"{reason} {count}" for reason, count in count_drops(drops).items())
        raise DataError(f"{path.name}: none of its {len(drops)} rows can be used ({reasons})")
    return Reading(
        records, tuple(drops), table.unread, table.doubled, files=table.files, others=table.others
    )


def count_drops(drops: Iterable[Drop]) -> dict[str, int]:
    """Returns how many rows were dropped for each reason, most frequent first."""
    return dict(Counter(drop.reason for drop in drops).most_common())


def _check_columns(table: Table, *, columns: ColumnsConfig, origin: str) -> None:
    """Raises for a column that no row has.

    Also for the input column, although a record may lack an input: otherwise a source that names
    its inputs differently would be trained on without them.
    """
    for field in ("instruction", "input", "output"):
        name = getattr(columns, field)
        if name is None or name in table.columns:
            continue
        hint = did_you_mean(name, table.columns)
        optional = ", or null if the source has no inputs" if field == "input" else ""
        raise DataError(
            f"{origin}: no column '{name}' (there are {', '.join(table.columns)}; name the right "
            f"one in data.columns.{field}{optional}){hint}"
        )


def _record(row: int, fields: Mapping[str, Any], *, columns: ColumnsConfig) -> Record | Drop:
    instruction, output = fields.get(columns.instruction), fields.get(columns.output)
    context = fields.get(columns.input) if columns.input is not None else None
    context = "" if context is None else context
    reason = (
        _fault(instruction, field="instruction")
        or _fault(output, field="output")
        or _fault(context, field=None)
    )
    if reason:
        return Drop(row, reason)
    assert isinstance(instruction, str)
    assert isinstance(output, str)
    return Record(row, instruction, context if context.strip() else "", output)


def _fault(value: object, *, field: str | None) -> str | None:
    """Returns why a value cannot be used, or None; without a ``field`` it may be blank."""
    if field and value is None:
        return f"missing_{field}"
    if not isinstance(value, str):
        return "not_text"
    if field and not value.strip():
        return f"empty_{field}"
    try:
        value.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON allows and no tokenizer accepts.
        return "not_unicode"
    return None
