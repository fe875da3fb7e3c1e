"""Every result on record reads, and is written again as it was."""

import json
from pathlib import Path

import pytest

from loracle.errors import RunFolderError
from loracle.records.files import to_json, write_json
from loracle.records.result import parse_result, read_result

RECORDS = sorted((Path(__file__).parents[2] / "results").rglob("result.json"))
ONE = RECORDS[0]

# Keys that a later version of this schema added, with what a result without them reads as.
ADDED = (
    ("efficiency", "peak_memory_gib", "train_tensors", None),
    ("quality", "base", "bleu_tokenize", None),
    ("quality", "tuned", "bleu_tokenize", None),
)


@pytest.fixture
def data():
    return json.loads(ONE.read_text(encoding="utf-8"))


def test_there_are_results_on_record():
    assert len(RECORDS) >= 35
    assert {record.parts[-4] for record in RECORDS} >= {"results", "placement_study"}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.parent.name)
def test_a_result_on_record_is_written_again_byte_for_byte(record, tmp_path):
    write_json(tmp_path / "again.json", to_json(read_result(record.parent)))
    expected = json.loads(record.read_text(encoding="utf-8"))
    for section, group, key, default in ADDED:
        expected[section][group].setdefault(key, default)
    expected.setdefault("data_warnings", [])
    spreads = dict.fromkeys(("example_spread_nats", "tolerated_spread_nats"))
    computed = {key: expected["audit"].pop(key) for key in ("reload_difference", "faults")}
    expected["audit"] = {**expected["audit"], **spreads, **expected["audit"], **computed}
    text = json.dumps(expected, indent=2, ensure_ascii=False) + "\n"
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == text


def test_an_older_result_has_defaults_for_keys_that_were_added(data):
    data["efficiency"]["peak_memory_gib"].pop("train_tensors", None)
    memory = parse_result(data, origin="old").efficiency.peak_memory_gib
    assert memory.train_tensors is None
    assert (memory.of_training, memory.kind_of_training) == (memory.train, "resident_set")


def test_counted_tensors_are_the_memory_of_training(data):
    data["efficiency"]["peak_memory_gib"]["train_tensors"] = 0.75
    memory = parse_result(data, origin="new").efficiency.peak_memory_gib
    assert (memory.of_training, memory.kind_of_training) == (0.75, "tensors")


def test_a_key_of_a_later_version_is_ignored(data):
    expected = parse_result(data, origin="now")
    data["quality"]["tuned"]["rouge"] = 0.5
    data["energy_j"] = 12
    assert parse_result(data, origin="later") == expected


@pytest.mark.parametrize("schema", [2, None, "1"])
def test_another_schema_is_refused(data, schema):
    data["schema"] = schema
    with pytest.raises(RunFolderError, match=rf"^r/result.json: schema is {schema!r}, .* reads 1$"):
        parse_result(data, origin="r/result.json")


def test_what_is_missing_or_of_another_type_is_named(data):
    tuned = data["quality"]["tuned"]
    tuned["perplexity"] = "low"
    with pytest.raises(RunFolderError, match=r"^r: quality\.tuned\.perplexity: .* valid number"):
        parse_result(data, origin="r")
    del tuned["perplexity"]
    with pytest.raises(RunFolderError, match=r"^r: quality\.tuned\.perplexity: field required$"):
        parse_result(data, origin="r")
