"""Folders: the one data file, the train files, or what the card says; else a clear error."""

import json
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_alpaca import ALPACA_COLUMNS, alpaca_rows, write_json

from loracle.data import read_records
from loracle.data.records import read_source
from loracle.errors import DataError

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: {}
---
# A dataset
"""


def read(folder):
    return read_records(folder, columns=ALPACA_COLUMNS)


def instructions(folder):
    return [record.instruction for record in read(folder)[0]]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_the_only_data_file_of_a_folder_is_read(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    write_json(tmp_path / "dataset_infos.json", {})
    (tmp_path / ".cache").mkdir()
    write_json(tmp_path / ".cache" / "left.json", [])
    write_json(tmp_path / "alpaca_data_cleaned.json", alpaca_rows(3))
    assert len(instructions(tmp_path)) == 3


def test_shards_of_the_train_split_are_read_in_order(tmp_path):
    rows = alpaca_rows(6)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[3:5])
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:3])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows[5:])
    records, _ = read(tmp_path)
    assert [record.instruction for record in records] == [row["instruction"] for row in rows[:5]]
    assert [record.row for record in records] == [1, 2, 3, 4, 5]


def test_rows_of_several_files_are_numbered_through_drops_included(tmp_path):
    rows = alpaca_rows(4)
    write_json(tmp_path / "train_1.json", [rows[0], None, rows[1]])
    write_json(tmp_path / "train_2.json", [None, rows[2], rows[3] | {"output": ""}])
    records, drops = read(tmp_path)
    assert [record.row for record in records] == [1, 3, 5]
    assert [(drop.row, drop.reason) for drop in drops] == [
        (2, "not_an_object"),
        (4, "not_an_object"),
        (6, "empty_output"),
    ]


@pytest.mark.parametrize("other", ["constraints.json", "test.json", "trainer_state.json"])
def test_train_is_a_word_and_not_a_part_of_one(tmp_path, other):
    write_json(tmp_path / "alpaca-train.json", alpaca_rows(2))
    write_json(tmp_path / other, alpaca_rows(5))
    assert len(instructions(tmp_path)) == 2


def test_a_train_folder_counts_as_a_name(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        write_json(tmp_path / part / "rows.json", alpaca_rows(2 if part == "train" else 4))
    assert len(instructions(tmp_path)) == 2


@pytest.mark.parametrize("names", [["a.json", "b.json"], ["train.json", "train.csv"]])
def test_several_files_and_no_telling_which_is_an_error_that_names_them(tmp_path, names):
    for name in names:
        write_json(tmp_path / name, alpaca_rows(2))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path.name}: 2 data files and no telling which to use")
    assert all(name in message for name in names)
    assert f"path:{tmp_path.name}/" in message


def test_a_folder_without_data_is_told_the_formats_there_are(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"no data file in this folder \(\.json, \.jsonl"):
        read(tmp_path)


def test_the_dataset_card_is_followed_without_network_or_cache(tmp_path, monkeypatch):
    rows = alpaca_rows(5)
    lines = "\n".join(json.dumps(row) for row in rows[:3])
    (tmp_path / "first.jsonl").write_text(lines, encoding="utf-8")
    write_json(tmp_path / "second.json", rows)
    (tmp_path / "README.md").write_text(CARD.format("first.jsonl"), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))

    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    records, _ = read(tmp_path)
    assert [record.instruction for record in records] == [row["instruction"] for row in rows[:3]]
    assert [record.row for record in records] == [1, 2, 3]
    assert sorted(tmp_path.rglob("*")) == before


NA = "instruction,input,output\nname,,None\ncode,007,N/A\nvalue,1.50,null\nnumber,,NaN\n"


def write_card(folder, front, *, start=""):
    (folder / "README.md").write_text(f"{start}---\n{front}\n---\n# Data\n", encoding="utf-8")


@pytest.mark.parametrize(("name", "text"), [("a.csv", NA), ("a.TSV", NA.replace(",", "\t"))])
def test_a_file_says_the_same_whoever_names_it(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    alone = read_records(tmp_path / name, columns=ALPACA_COLUMNS)
    assert [one.output for one in alone[0]] == ["None", "N/A", "null", "NaN"]
    assert [one.input for one in alone[0]] == ["", "007", "1.50", ""]
    write_card(tmp_path, f"configs: [{{config_name: x, data_files: {name}}}]")
    assert read(tmp_path) == alone


@pytest.mark.parametrize(
    ("front", "count"),
    [
        ("configs: [{data_files: two.json}]", 2),
        ("configs:\r\n- data_files: two.json\r", 2),
        ("configs: [{data_files: [two.json, more/three.json]}]", 5),
        ("configs: [{data_files: '*.json'}]", 3),
        ("configs: [{data_files: 'more/**'}]", 3),
        ("configs: [{data_dir: more}]", 3),
        ("configs: [{data_dir: more, data_files: '*.json'}]", 3),
        ("configs: [{config_name: a, data_files: one.json}]", 1),
        ("configs: [{data_files: {test: one.json, train: [two.json]}}]", 2),
        (
            "configs: [{data_files: one.json}, {default: true, data_files: two.json}]",
            2,
        ),
        (
            "configs: [{config_name: default, data_files: one.json}, {data_files: two.json}]",
            1,
        ),
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_cards_name_files_in_many_ways(tmp_path, front, count, start):
    (tmp_path / "more").mkdir()
    for name, rows in (("one.json", 1), ("two.json", 2), ("more/three.json", 3)):
        write_json(tmp_path / name, alpaca_rows(rows))
    write_card(tmp_path, front, start=start)
    assert len(instructions(tmp_path)) == count


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@pytest.mark.parametrize("key", ["sep", "delimiter"])
def test_the_delimiter_of_a_card_is_used(tmp_path, delimiter, key):
    text = NA.replace(",", delimiter)
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    write_card(tmp_path, f"configs: [{{data_files: a.csv, {key}: {json.dumps(delimiter)}}}]")
    assert [record.input for record in read(tmp_path)[0]] == ["", "007", "1.50", ""]


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("configs: [{data_files: absent.json}]", "no file matches 'absent.json'"),
        ("configs: 3", "configs is not a list"),
        ("configs: [{", "broken YAML"),
        ("configs: [{data_files: first.json, skiprows: 3}]", "it sets 'skiprows'"),
        ("configs: [{data_files: first.json, sep: '::'}]", "delimiter is '::', not one"),
        ("configs: [{data_files: {test: first.json}}]", "no split 'train' in it (there are test)"),
        ("configs: [{data_files: ../first.json}]", "'../first.json' is not in this folder"),
        ("configs: [{data_files: 'https://a.b/c.json'}]", "'https://a.b/c.json' is not in"),
        ("configs: [{data_files: /etc/passwd}]", "'/etc/passwd' is not in this folder"),
        ("configs: [{data_files: first.json, data_dir: ..}]", "'..' is not in this folder"),
        ("configs: [{data_files: [3]}]", "[3] is no list of files"),
        ("configs: [{data_files: [{split: train}]}]", "an entry without split and path"),
        (
            "configs: [{data_files: [{split: train, path: a}, {split: train, path: b}]}]",
            "names a split twice",
        ),
        (
            "configs: [{config_name: en, data_files: first.json}, {config_name: de}]",
            "2 configurations (en, de) and no one default",
        ),
    ],
)
def test_a_card_that_cannot_be_followed_is_one_line(tmp_path, front, reason):
    write_json(tmp_path / "first.json", alpaca_rows(2))
    write_card(tmp_path, front)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path.name}: its dataset card cannot be followed (")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400


def test_files_that_are_joined_and_those_that_are_not_read_are_known(tmp_path):
    for name, rows in (("train-1.json", 2), ("train-2.JSON", 3), ("Test.ndjson", 4)):
        write_json(tmp_path / name, alpaca_rows(rows))
    reading = read_source(tmp_path, columns=ALPACA_COLUMNS)
    assert reading.files == (("train-1.json", 2), ("train-2.JSON", 3))
    assert reading.others == ("Test.ndjson",)


def test_what_is_unread_or_doubled_in_joined_files_is_numbered_through(tmp_path):
    rows = [row | {"system": "Be terse." if n % 2 else ""} for n, row in enumerate(alpaca_rows(5))]
    write_json(tmp_path / "train-1.json", rows[:3])
    lines = "".join(f"{json.dumps(row)}\n" for row in rows[3:])
    doubled = '{"instruction": "a", "input": "", "output": "b", "output": "c"}\n'
    (tmp_path / "train-2.json").write_text(lines + doubled, encoding="utf-8")
    reading = read_source(tmp_path, columns=ALPACA_COLUMNS)
    assert reading.unread == {"system": [2, 4]}
    assert reading.doubled == (6,)
    assert reading.records[-1].output == "c"
