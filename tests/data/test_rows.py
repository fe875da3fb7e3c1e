"""Every format yields the same rows; a file that breaks its format is told where."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_alpaca import ALPACA_COLUMNS, alpaca_rows, write_json

from loracle.data import read_records
from loracle.data.records import read_source
from loracle.data.rows import Drop, read_table
from loracle.errors import DataError

ROWS = [
    *alpaca_rows(4),
    # What trips line readers: quotes, commas, newlines, and separators that JSON leaves unescaped.
    {"instruction": 'Quote, "this"', "input": "two\nlines", "output": "a\u2028b\x0bc\x85d"},
]


def write_as(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix in (".jsonl", ".ndjson"):
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(text.getvalue().encode())
    return path


def fault(path, *, columns=ALPACA_COLUMNS):
    """The message of the DataError that reading ``path`` raises, checked to be one line."""
    with pytest.raises(DataError) as caught:
        read_records(path, columns=columns)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(path.name)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_holds_the_same_records(tmp_path, name):
    records, drops = read_records(write_as(tmp_path / name, ROWS), columns=ALPACA_COLUMNS)
    texts = [
        {"instruction": one.instruction, "input": one.input, "output": one.output}
        for one in records
    ]
    assert texts == ROWS
    assert drops == []


@pytest.mark.parametrize("name", ["a.JSON", "a.Csv"])
def test_suffixes_are_read_in_any_case(tmp_path, name):
    lower = write_as(tmp_path / name.lower(), ROWS)
    upper = lower.rename(tmp_path / name)
    assert len(read_records(upper, columns=ALPACA_COLUMNS)[0]) == len(ROWS)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_json_lines_under_a_json_suffix_are_recognised(tmp_path, ending):
    path = tmp_path / "a.json"
    path.write_bytes(ending.join(json.dumps(row) for row in alpaca_rows(3)).encode())
    rows = [record.row for record in read_records(path, columns=ALPACA_COLUMNS)[0]]
    assert rows == ([1, 3, 5] if ending == "\n\n" else [1, 2, 3])


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_of_one_object_is_one_row(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(alpaca_rows(1)[0], indent=indent), encoding="utf-8")
    assert len(read_records(path, columns=ALPACA_COLUMNS)[0]) == 1


def test_a_csv_row_is_numbered_by_the_line_where_it_starts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,input,output\na,"x\ny",b\n\nc,,d\n', encoding="utf-8")
    assert [one.row for one in read_records(path, columns=ALPACA_COLUMNS)[0]] == [2, 5]


def test_a_csv_row_with_too_few_or_too_many_fields_is_dropped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\na,,b\na,b\na,b,c,d\n", encoding="utf-8")
    records, drops = read_records(path, columns=ALPACA_COLUMNS)
    assert [one.row for one in records] == [2]
    assert drops == [Drop(3, "wrong_field_count"), Drop(4, "wrong_field_count")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_accepted(tmp_path, name):
    path = write_as(tmp_path / name, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_records(path, columns=ALPACA_COLUMNS)[0][0].instruction == ROWS[0]["instruction"]


def test_parquet_reads_no_column_that_is_not_wanted(tmp_path):
    path = write_as(tmp_path / "a.parquet", [row | {"embedding": [0.0] * 9} for row in ROWS])
    table = read_table(path, columns=["instruction", "output"])
    assert table.columns == ("instruction", "input", "output", "embedding")
    assert set(table.rows[0][1]) == {"instruction", "output"}


def test_a_missing_file_is_told_its_nearest_neighbour(tmp_path):
    write_json(tmp_path / "alpaca.json", ROWS)
    assert "no such file; did you mean 'alpaca.json'?" in fault(tmp_path / "alpacca.json")
    assert "no such file" in fault(tmp_path / "nowhere" / "alpaca.json")


@pytest.mark.parametrize(("name", "given"), [("a.xlsx", "suffix '.xlsx'"), ("a", "no suffix")])
def test_another_format_is_told_the_formats_there_are(tmp_path, name, given):
    (tmp_path / name).write_bytes(b"PK")
    assert f"{given}; must be one of .json, .jsonl" in fault(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.json", '[\n {"instruction": "a"},\n {"instruction" "b"}\n]', "a.json:3:17:"),
        ("a.json", '{"instruction": "a",\n', "a.json:2:1:"),
        ("a.json", '{"instruction": "a"}\n{"instruction": }\n', "a.json:2:17:"),
        ("a.jsonl", '{"instruction": "a"}\n\n{"instruction": "b"\n', "a.jsonl:3:20:"),
        ("a.json", "not json", "a.json:1:1:"),
    ],
)
def test_broken_json_is_told_line_and_column(tmp_path, name, text, place):
    (tmp_path / name).write_text(text, encoding="utf-8")
    message = fault(tmp_path / name)
    line, column = place.split(":")[1:3]
    assert message.startswith(place)
    assert f"at line {line}, column {column}" in message


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "9" * 5000 + "]"])
def test_json_beyond_what_can_be_read_is_an_error_not_a_crash(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert "JSON that cannot be read" in fault(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_what_is_not_utf8_is_told_line_and_byte(tmp_path, name):
    (tmp_path / name).write_bytes(b"abc\nd\xe9f")
    message = fault(tmp_path / name)
    assert message.startswith(f"{name}:2: not UTF-8 at byte 5 (0xe9)")
    assert "UTF-16" not in message


def test_utf16_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes("[]".encode("utf-16"))
    assert "not UTF-8 at byte 0" in fault(tmp_path / "a.json")
    assert "looks like UTF-16" in fault(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("a.json", text) for text in (b"", b" \n", b"[]", b"\xef\xbb\xbf")),
        *(("a.jsonl", b"\n\n"), ("a.csv", b""), ("a.csv", b"instruction,input,output\n")),
    ],
)
def test_an_empty_file_is_told_so(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert fault(tmp_path / name) == f"{name}: empty, no records in it"


def test_an_empty_parquet_table_is_told_so(tmp_path):
    table = pa.table({name: pa.array([], pa.string()) for name in ROWS[0]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "empty, no records" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"instruction,input,output", b"PAR1" * 8])
def test_what_is_not_parquet_is_told_so(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    assert "Parquet that cannot be read" in fault(tmp_path / "a.parquet")


def test_broken_csv_quoting_is_told_where_the_row_starts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,input,output\na,,b\n"open,,c\nd,,e\n', encoding="utf-8")
    assert fault(path).startswith("a.csv:3: broken row that starts here")


def test_a_csv_column_named_twice_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,output\na,b,c\n", encoding="utf-8")
    assert "a.csv:1: column 'output' is named twice" in fault(tmp_path / "a.csv")


def test_what_the_system_does_not_let_us_read_is_told_why(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", ROWS)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    assert fault(path) == "a.json: cannot be read (Permission denied)"


@pytest.mark.parametrize("name", ["a.csv", "a.TSV"])
def test_a_cell_may_be_as_long_as_the_file(tmp_path, name):
    rows = [row | {"output": "so on, " * 30_000} for row in ROWS[:2]]
    records, _ = read_records(write_as(tmp_path / name.lower(), rows), columns=ALPACA_COLUMNS)
    assert [one.output for one in records] == [row["output"] for row in rows]
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("text", ["None", "N/A", "null", "NaN", "007", "1.50", "1e5", "True", "-0"])
def test_every_cell_is_text(tmp_path, name, text):
    row = {"instruction": text, "input": text, "output": text}
    records, drops = read_records(write_as(tmp_path / name, [row]), columns=ALPACA_COLUMNS)
    assert not drops
    assert (records[0].instruction, records[0].input, records[0].output) == (text,) * 3


OTHERS = {"system": "Be terse.", "history": [["a", "b"]], "id": 7, "blank": " ", "none": None}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.parquet"])
def test_columns_that_are_not_read_are_known_with_the_rows_that_fill_them(tmp_path, name):
    empty = {"system": "", "history": [], "id": 8, "blank": "", "none": None}
    rows = [row | (OTHERS if n in (1, 3) else empty) for n, row in enumerate(alpaca_rows(5))]
    reading = read_source(write_as(tmp_path / name, rows), columns=ALPACA_COLUMNS)
    assert reading.unread == {"system": [2, 4], "history": [2, 4], "id": [1, 2, 3, 4, 5]}
    assert reading.files == ((name, 5),)


def test_a_csv_column_that_is_not_read_is_known_by_lines(tmp_path):
    rows = [row | {"system": "Be terse." if n == 1 else " "} for n, row in enumerate(ROWS)]
    reading = read_source(write_as(tmp_path / "a.csv", rows), columns=ALPACA_COLUMNS)
    assert reading.unread == {"system": [3]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("keys", "doubled"),
    [
        ('"output": "x", "output": "y"', True),
        ('"output": "y", "output": "y"', False),
        ('"id": 1, "output": "y", "id": 2', True),
        ('"output": "y", "meta": {"a": 1, "a": 2}', False),
    ],
)
def test_a_key_with_two_values_is_known_and_the_last_counts(tmp_path, name, keys, doubled):
    line = '{"instruction": "a", "input": "b", ' + keys + "}"
    good = json.dumps(ROWS[0])
    text = f"{good}\n{line}\n" if name == "a.jsonl" else f"[{good},\n{line}]"
    (tmp_path / name).write_text(text, encoding="utf-8")
    reading = read_source(tmp_path / name, columns=ALPACA_COLUMNS)
    assert reading.doubled == ((2,) if doubled else ())
    assert reading.records[1].output == "y"
