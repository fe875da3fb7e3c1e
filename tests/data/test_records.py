"""Records: which rows are kept, which are dropped and why, and what a wrong source is told."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_alpaca import ALPACA_COLUMNS, alpaca_rows, write_json

from loracle.config.run import ColumnsConfig
from loracle.data import Drop, Record, read_records
from loracle.data.records import count_drops
from loracle.errors import DataError

GOOD = {"instruction": "Say hi.", "input": "", "output": "Hi."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["Say hi.", "", "Hi."], "not_an_object"),
        (None, "not_an_object"),
        ({"output": "Hi."}, "missing_instruction"),
        (GOOD | {"instruction": None}, "missing_instruction"),
        ({"instruction": "Say hi."}, "missing_output"),
        (GOOD | {"output": None}, "missing_output"),
        (GOOD | {"instruction": " \n"}, "empty_instruction"),
        (GOOD | {"output": "\t\u00a0"}, "empty_output"),
        (GOOD | {"output": 42}, "not_text"),
        (GOOD | {"instruction": ["Say", "hi"]}, "not_text"),
        (GOOD | {"input": 0}, "not_text"),
        (GOOD | {"output": "\ud83d"}, "not_unicode"),
        (GOOD | {"input": "\ude00"}, "not_unicode"),
    ],
)
def test_an_unusable_row_is_dropped_with_its_reason_and_row(tmp_path, row, reason):
    path = write_json(tmp_path / "a.json", [GOOD, row, GOOD])
    records, drops = read_records(path, columns=ALPACA_COLUMNS)
    assert [record.row for record in records] == [1, 3]
    assert drops == [Drop(2, reason)]


@pytest.mark.parametrize("empty", [{"input": None}, {"input": " \n"}, {"input": ""}])
def test_a_null_or_blank_input_is_an_empty_one(tmp_path, empty):
    path = write_json(tmp_path / "a.json", [GOOD | empty])
    assert read_records(path, columns=ALPACA_COLUMNS)[0] == [Record(1, "Say hi.", "", "Hi.")]


def test_a_row_without_the_input_key_has_an_empty_input(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, GOOD | {"input": "x"}]
    records, _ = read_records(write_json(tmp_path / "a.json", rows), columns=ALPACA_COLUMNS)
    assert [record.input for record in records] == ["", "x"]


def test_texts_are_kept_to_the_character(tmp_path):
    texts = {"instruction": "  Say\n", "input": "\tthis ", "output": " \r\nHi \U0001f600.\n"}
    path = write_json(tmp_path / "a.json", [texts])
    record = read_records(path, columns=ALPACA_COLUMNS)[0][0]
    assert (record.instruction, record.input, record.output) == tuple(texts.values())


def test_other_column_names_are_read_as_configured(tmp_path):
    rows = [{"prompt": "a", "context": "b", "response": "c", "input": "not this"}]
    path = write_json(tmp_path / "a.json", rows)
    columns = ColumnsConfig(instruction="prompt", input="context", output="response")
    assert read_records(path, columns=columns)[0] == [Record(1, "a", "b", "c")]
    columns = ColumnsConfig(instruction="prompt", input=None, output="response")
    assert read_records(path, columns=columns)[0] == [Record(1, "a", "", "c")]


@pytest.mark.parametrize(
    ("field", "have", "nearest"),
    [("instruction", "instructions", True), ("output", "ouput", True), ("input", "topic", False)],
)
def test_a_wrong_column_is_told_the_columns_there_are_and_the_nearest(
    tmp_path, field, have, nearest
):
    rows = [{have if key == field else key: text for key, text in GOOD.items()}]
    with pytest.raises(DataError) as caught:
        read_records(write_json(tmp_path / "a.json", rows), columns=ALPACA_COLUMNS)
    message = str(caught.value)
    assert message.startswith(f"a.json: no column '{field}' (there are ")
    assert have in message
    assert f"data.columns.{field}" in message
    assert ("null if the source has no inputs" in message) == (field == "input")
    assert message.endswith(f"; did you mean '{have}'?") == nearest
    assert "\n" not in message


def test_a_source_without_a_usable_row_is_told_the_counts_by_reason(tmp_path):
    rows = [GOOD | {"output": ""}, 7, GOOD | {"output": " "}, GOOD | {"instruction": None}]
    with pytest.raises(DataError) as caught:
        read_records(write_json(tmp_path / "a.json", rows), columns=ALPACA_COLUMNS)
    assert str(caught.value) == (
        "a.json: none of its 4 rows can be used "
        "(empty_output 2, not_an_object 1, missing_instruction 1)"
    )


def test_a_file_of_anything_but_objects_is_told_so(tmp_path):
    with pytest.raises(DataError, match=r"none of its 2 rows can be used \(not_an_object 2\)"):
        read_records(write_json(tmp_path / "a.json", [1, "two"]), columns=ALPACA_COLUMNS)


def test_drops_are_counted_most_frequent_first():
    drops = [Drop(1, "empty_output"), Drop(2, "not_text"), Drop(3, "not_text")]
    assert list(count_drops(drops).items()) == [("not_text", 2), ("empty_output", 1)]


JSON_VALUES = st.one_of(st.none(), st.integers(), st.lists(st.none(), max_size=1), st.text())
JSON_ROWS = st.one_of(
    JSON_VALUES,
    st.dictionaries(st.sampled_from(["instruction", "input", "output"]), JSON_VALUES),
)


@given(rows=st.lists(JSON_ROWS, max_size=8))
def test_every_row_is_either_a_record_or_a_drop(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.json"
    rows = [*alpaca_rows(1), *rows]
    path.write_text(json.dumps(rows), encoding="utf-8")
    records, drops = read_records(path, columns=ALPACA_COLUMNS)
    numbers = sorted([*(one.row for one in records), *(one.row for one in drops)])
    assert numbers == list(range(1, len(rows) + 1))
    assert all(one.instruction.strip() and one.output.strip() for one in records)
