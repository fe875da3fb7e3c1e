"""What of a source a run does not see is counted, said in a line each, and warned of."""

import json

import pytest
from tiny_alpaca import alpaca_rows, data_config, write_json

from loracle.data import prepare_data
from loracle.sources import ResolvedSource

LONG = {"instruction": "long " * 300, "input": "", "output": "x"}
LIMIT = 250


def prepare(path, tokenizer, **changes):
    source = ResolvedSource(path, "alpaca-demo", "sha256:0")
    config = data_config(**{"max_tokens": LIMIT} | changes)
    return prepare_data(source, config=config, tokenizer=tokenizer)


def with_others(count, *others, at=0):
    """Usable rows with others from row ``at`` + 1 on."""
    rows = alpaca_rows(count)
    return [*rows[:at], *others, *rows[at:]]


def test_nothing_is_said_of_data_that_is_used_as_it_stands(tmp_path, tokenizer):
    data = prepare(write_json(tmp_path / "a.json", alpaca_rows(40)), tokenizer)
    assert data.notices == ()
    assert data.report["warnings"] == []
    assert data.report["dropped"] == {}
    assert data.report["files"] == [{"name": "a.json", "num_rows": 40}]
    none = {"count": 0, "rows": []}
    assert data.report["truncated"] == data.report["doubled_keys"] == none
    assert data.report["unread_columns"] == {}
    assert data.report["unread_files"] == []


def test_many_records_left_out_are_a_warning_with_counts_rows_and_reasons(tmp_path, tokenizer):
    rows = with_others(
        13, *[LONG | {"instruction": f"{i} {LONG['instruction']}"} for i in range(47)]
    )
    data = prepare(write_json(tmp_path / "a.json", rows), tokenizer)
    line = (
        f"47 of 60 records are left out: prompt longer than data.max_tokens {LIMIT} allows "
        "(rows 1, 2, 3, 4, 5, ...)"
    )
    assert f"warning: {line}" in data.notices
    assert data.report["warnings"] == [line]
    assert data.report["dropped"]["prompt_too_long"]["count"] == 47


@pytest.mark.parametrize(("bad", "warned"), [(1, False), (4, False), (5, True), (40, True)])
def test_a_tenth_of_the_records_may_be_left_out_without_a_warning(tmp_path, tokenizer, bad, warned):
    rows = with_others(40, *[{"instruction": "a", "input": "", "output": 3}] * bad, at=2)
    data = prepare(write_json(tmp_path / "a.json", rows), tokenizer)
    line = data.notices[0]
    verb = "is" if bad == 1 else "are"
    assert f"{bad} of {40 + bad} records {verb} left out: a number or list for a text" in line
    assert "row 3)" in line or "(rows 3, 4," in line
    assert line.startswith("warning: ") == warned
    assert bool(data.report["warnings"]) == warned


def test_several_reasons_stand_in_one_line(tmp_path, tokenizer):
    rows = with_others(40, None, {"instruction": "a", "input": "", "output": " "}, None, LONG)
    data = prepare(write_json(tmp_path / "a.json", rows), tokenizer)
    (line,) = data.notices[:1]
    assert line.startswith("4 of 44 records are left out: no object, 2 (rows 1, 3); ")
    assert "an empty output, 1 (row 2)" in line
    assert f"prompt longer than data.max_tokens {LIMIT} allows, 1 (row 4)" in line


def test_records_that_were_not_drawn_are_not_counted_as_left_out(tmp_path, tokenizer):
    rows = with_others(60, *[None] * 3, *[LONG | {"output": str(i)} for i in range(40)])
    path = write_json(tmp_path / "a.json", rows)
    data = prepare(path, tokenizer, max_records=20)
    count = data.report["dropped"]["prompt_too_long"]["count"]
    assert 0 < count < 20
    assert data.notices[0].startswith("3 of 103 records are left out: no object (rows 1, 2, 3)")
    assert data.notices[1].startswith(f"warning: {count} of 20 drawn records are left out: ")
    assert len(data.report["warnings"]) == 1


def test_columns_and_keys_and_cuts_are_said_with_their_rows(tmp_path, tokenizer):
    rows = [
        row | {"system": "Be terse." if n in (1, 5) else "", "history": [["a"]] if n == 5 else []}
        for n, row in enumerate(alpaca_rows(20))
    ]
    rows[7]["output"] = "so on " * 300
    lines = [json.dumps(row) for row in rows]
    lines[2] = lines[2][:-1] + ', "output": "The last."}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    data = prepare(path, tokenizer)
    assert data.notices == (
        "2 columns not read: system (2 records, rows 2, 6), history (1 record, row 6)",
        "1 record with duplicate keys, of which the last value counts (row 3)",
        f"1 response cut at data.max_tokens {LIMIT} (row 8)",
    )
    assert data.report["unread_columns"]["system"] == {"count": 2, "rows": [2, 6]}
    assert data.report["doubled_keys"] == {"count": 1, "rows": [3]}
    assert data.report["truncated"] == {"count": 1, "rows": [8]}


def test_files_that_are_joined_or_not_read_are_named(tmp_path, tokenizer):
    for name, count in (("train-1.json", 12), ("train-2.json", 8), ("test.json", 4)):
        rows = [row | {"instruction": f"{name} {row['instruction']}"} for row in alpaca_rows(count)]
        write_json(tmp_path / name, rows)
    data = prepare(tmp_path, tokenizer, max_tokens=300)
    assert data.notices == (
        "1 data file of the folder not read: test.json",
        "2 files are read as one, their rows numbered through: train-1.json (12), train-2.json (8)",
    )


def test_a_fraction_that_is_not_the_one_asked_is_said(tmp_path, tokenizer):
    rows = [row for row in alpaca_rows(3) for _ in range(10)]
    data = prepare(write_json(tmp_path / "a.json", rows), tokenizer)
    (line,) = data.notices
    assert line.startswith("10 of 30 records are held out, 33.3 % and not the 20.0 % of data.val")
    assert data.report["repeated_records"] == {"num_groups": 3, "num_records": 30}


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "\u202e"])
def test_a_name_in_a_notice_is_harmless(tmp_path, tokenizer, name):
    rows = [row | {name: "x"} for row in alpaca_rows(20)]
    (line,) = prepare(write_json(tmp_path / "a.json", rows), tokenizer).notices
    assert line.isprintable()
