"""Prepared data: what a run gets, what data.json says of it, and when two runs share it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_alpaca import alpaca_rows, byte_tokenizer, data_config, write_json
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from loracle.data import prepare_data
from loracle.data.split import normalized
from loracle.data.summary import fingerprint, public_source
from loracle.data.tokens import Example
from loracle.errors import DataError, ModelError
from loracle.sources import ResolvedSource


def prepare(path, tokenizer, **changes):
    source = ResolvedSource(path, "alpaca-demo", "sha256:0")
    return prepare_data(source, config=data_config(**changes), tokenizer=tokenizer)


@pytest.fixture
def demo(tmp_path):
    return write_json(tmp_path / "demo.json", alpaca_rows(40))


def limit_in_the_middle(path, tokenizer):
    """A limit that cuts some responses and drops the longer prompts."""
    data = prepare(path, tokenizer)
    short = [one for one in (*data.train, *data.validation) if not one.record.input]
    return max(one.num_prompt for one in short) + 2


def texts(examples):
    return [(one.record.instruction, one.record.output) for one in examples]


def test_the_parts_hold_every_record_once_in_source_order(demo, tokenizer):
    data = prepare(demo, tokenizer)
    rows = [[one.record.row for one in part] for part in (data.train, data.validation)]
    assert [len(part) for part in rows] == [32, 8]
    assert sorted(rows[0] + rows[1]) == list(range(1, 41))
    assert rows == [sorted(part) for part in rows]


def test_the_report_adds_up_and_is_json(demo, tokenizer):
    data = prepare(demo, tokenizer, max_tokens=limit_in_the_middle(demo, tokenizer))
    report = json.loads(json.dumps(data.report, allow_nan=False))
    assert report == data.report
    assert report["fingerprint"] == data.fingerprint
    assert report["source"] == "alpaca-demo"
    assert report["revision"] == "sha256:0"
    assert report["validation_frac_asked"] == 0.2
    assert report["template"]["name"] == "alpaca"
    assert report["num_records_read"] == report["num_records_used"] == 40
    for name, examples in (("train", data.train), ("validation", data.validation)):
        part = report[name]
        assert part["num_examples"] == len(examples)
        assert part["num_tokens"] == sum(one.num_tokens for one in examples)
        assert part["num_targets"] == sum(one.num_targets for one in examples)
        assert part["num_truncated"] == sum(one.truncated for one in examples)
        totals = part["tokens_per_example"]["total"]
        lengths = sorted(one.num_tokens for one in examples)
        assert (totals["min"], totals["max"]) == (lengths[0], lengths[-1])
        assert totals["p50"] == np.median(lengths)
        assert totals["mean"] == pytest.approx(sum(lengths) / len(lengths))
        means = [part["tokens_per_example"][kind]["mean"] for kind in ("prompt", "response")]
        assert sum(means) == pytest.approx(totals["mean"])
    assert report["train"]["num_truncated"] > 0
    counted = report["dropped"]["prompt_too_long"]["count"]
    assert counted + len(data.train) + len(data.validation) == 40


def test_quantiles_are_the_named_ones(demo, tokenizer):
    data = prepare(demo, tokenizer)
    lengths = [one.num_targets for one in data.train]
    quantiles = data.report["train"]["tokens_per_example"]["response"]
    assert " ".join(quantiles) == "min p10 p25 p50 p75 p90 p95 p99 max mean"
    for percent in (10, 25, 50, 75, 90, 95, 99):
        assert quantiles[f"p{percent}"] == np.quantile(lengths, percent / 100)


def test_drops_are_reported_by_reason_with_rows(tmp_path, tokenizer):
    rows = [*alpaca_rows(10), "no", {"instruction": "a", "output": ""}, None]
    # Unlike every other instruction, so that it falls in whichever part and empties none.
    rows.append({"instruction": "long " * 300, "input": "", "output": "x"})
    data = prepare(write_json(tmp_path / "a.json", rows), tokenizer)
    assert data.report["dropped"] == {
        "not_an_object": {"count": 2, "rows": [11, 13]},
        "empty_output": {"count": 1, "rows": [12]},
        "prompt_too_long": {"count": 1, "rows": [14]},
    }
    assert data.report["num_records_read"] == 14
    assert data.report["num_records_used"] == 11
    parts = len(data.train), len(data.validation)
    assert sum(parts) == 10
    assert data.report["validation_frac"] == parts[1] / 10


def test_recurring_instructions_are_counted_and_do_not_straddle(tmp_path, tokenizer):
    again = [row | {"instruction": row["instruction"].upper()} for row in alpaca_rows(30)[:6]]
    again += [row | {"output": "Another."} for row in again[:2]]
    data = prepare(write_json(tmp_path / "a.json", [*alpaca_rows(30), *again]), tokenizer)
    assert data.report["recurring_instructions"] == {"num_groups": 6, "num_records": 14}
    train, validation = (
        {normalized(one.record.instruction) for one in part}
        for part in (data.train, data.validation)
    )
    assert not train & validation


def test_max_records_are_drawn_before_the_split(demo, tokenizer):
    data = prepare(demo, tokenizer, max_records=10)
    assert (len(data.train), len(data.validation)) == (8, 2)
    assert data.report["num_records_read"] == 40
    assert data.report["num_records_used"] == 10
    with pytest.raises(DataError, match="too few records to split"):
        prepare(demo, tokenizer, max_records=1)


def test_the_split_does_not_depend_on_the_tokenizer_or_the_limit(demo, tokenizer, bos_tokenizer):
    whole = {one.record.row for one in prepare(demo, tokenizer).validation}
    assert {one.record.row for one in prepare(demo, bos_tokenizer).validation} == whole
    short = prepare(demo, tokenizer, max_tokens=limit_in_the_middle(demo, tokenizer))
    assert short.report["dropped"]
    assert {one.record.row for one in short.validation} < whole
    assert not {one.record.row for one in short.train} & whole


@pytest.mark.parametrize("max_tokens", [8, 40])
def test_a_limit_below_the_prompt_names_the_smallest_that_would_work(demo, tokenizer, max_tokens):
    with pytest.raises(DataError) as caught:
        prepare(demo, tokenizer, max_tokens=max_tokens)
    message = str(caught.value)
    assert message.startswith(f"data.max_tokens: {max_tokens} is below every prompt")
    assert "\n" not in message
    smallest, largest = map(int, re.findall(r"\d+", message)[-2:])
    assert prepare(demo, tokenizer, max_tokens=smallest)
    with pytest.raises(DataError):
        prepare(demo, tokenizer, max_tokens=smallest - 1)
    assert prepare(demo, tokenizer, max_tokens=largest).report["dropped"] == {}
    assert prepare(demo, tokenizer, max_tokens=largest - 1).report["dropped"]


def test_the_smallest_limit_works_for_both_parts(tmp_path, tokenizer):
    rows = [alpaca_rows(1)[0], {"instruction": "long " * 50, "input": "", "output": "x"}]
    path = write_json(tmp_path / "a.json", rows)
    with pytest.raises(DataError, match="smallest limit that would work") as caught:
        prepare(path, tokenizer, max_tokens=8)
    smallest = int(re.findall(r"\d+", str(caught.value))[-2])
    assert prepare(path, tokenizer, max_tokens=smallest).report["dropped"] == {}


def test_a_part_that_a_tokenizer_finds_empty_is_an_error(demo):
    backend = Tokenizer(models.BPE({"</s>": 0, "\u4e00": 1}, []))
    blind = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(DataError, match="train: the tokenizer finds no tokens in any of its 32"):
        prepare(demo, blind)


def test_a_tokenizer_without_eos_is_refused_before_the_data_is_read(tmp_path):
    with pytest.raises(ModelError, match="no EOS"):
        prepare(tmp_path / "absent.json", byte_tokenizer(eos_token=None))


def test_a_custom_template_is_tokenised_and_named(demo, tokenizer):
    template = {"with_input": "{instruction} {input}", "without_input": "{instruction}"}
    data = prepare(demo, tokenizer, template=template)
    one = data.train[0]
    text = " ".join(filter(None, (one.record.instruction, one.record.input)))
    assert tokenizer.decode(one.input_ids[: one.num_prompt]) == text
    assert data.report["template"]["name"] == "custom"


def test_the_fingerprint_does_not_depend_on_the_file(demo, tmp_path, tokenizer):
    lines = tmp_path / "other.jsonl"
    rows = ["null", *(json.dumps(row) for row in alpaca_rows(40))]
    lines.write_text("\n\n".join(rows), encoding="utf-8")
    one, other = prepare(demo, tokenizer), prepare(lines, tokenizer)
    assert one.fingerprint == other.fingerprint
    assert texts(one.train) == texts(other.train)
    assert one.train[0].record.row != other.train[0].record.row


@pytest.mark.parametrize(
    "changes",
    [{"split_seed": 1}, {"validation_frac": 0.3}, {"max_tokens": 225}, {"max_records": 39}],
)
def test_the_fingerprint_follows_what_the_model_sees(demo, tokenizer, changes):
    assert prepare(demo, tokenizer).fingerprint != prepare(demo, tokenizer, **changes).fingerprint


def test_the_fingerprint_follows_the_tokenizer(demo, tokenizer, bos_tokenizer):
    assert prepare(demo, tokenizer).fingerprint != prepare(demo, bos_tokenizer).fingerprint


IDS = st.lists(st.integers(0, 3), min_size=2, max_size=4).map(tuple)
PARTS = st.lists(st.builds(Example, st.none(), IDS, st.integers(1, 2), st.booleans()), max_size=3)


def seen(part):
    return [(one.input_ids, one.num_prompt) for one in part]


@given(parts=st.tuples(PARTS, PARTS), others=st.tuples(PARTS, PARTS))
def test_fingerprints_are_equal_only_for_equal_data(parts, others):
    same = [seen(part) for part in parts] == [seen(part) for part in others]
    one, other = (fingerprint(train, validation=held) for train, held in (parts, others))
    assert (one == other) == same
    assert len(one) == 16


@given(train=PARTS, validation=PARTS.filter(bool))
def test_fingerprints_follow_the_split_and_nothing_but_tokens(train, validation):
    digits = fingerprint(train, validation=validation)
    assert fingerprint([*train, *validation], validation=[]) != digits
    renamed = [replace(one, record="elsewhere", truncated=True) for one in train]
    assert fingerprint(renamed, validation=validation) == digits


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("path:/home/someone/alpaca.json", "path:alpaca.json"),
        ("path:~/alpaca.json", "path:alpaca.json"),
        ("path:data/alpaca.json", "path:data/alpaca.json"),
        ("hub:tatsu-lab/alpaca@main", "hub:tatsu-lab/alpaca@main"),
        ("alpaca-demo", "alpaca-demo"),
    ],
)
def test_an_absolute_path_is_not_recorded(source, public):
    assert public_source(source) == public


def test_no_absolute_path_is_in_the_report(demo, tokenizer):
    source = ResolvedSource(demo, f"path:{demo}", "sha256:0")
    data = prepare_data(source, config=data_config(), tokenizer=tokenizer)
    assert str(demo.parent) not in json.dumps(data.report)
