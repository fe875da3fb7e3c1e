"""What a run leaves out of its data stands on the screen, in its records and in its tables."""

import json

from runs_fixture import load, settings


def test_records_left_out_are_said_and_stand_in_every_table(place):
    rows = json.loads(place.data.read_text(encoding="utf-8"))[:24]
    for number, row in enumerate(rows[:8]):
        row["instruction"] = f"{number} {'and so on ' * 300}"
    rows[9]["system"] = "Be terse."
    data = place.work / "left-out.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    run = place.work / "left-out"
    changes = {"data__source": f"path:{data}", "train__max_steps": 2, "eval__every_steps": 0}
    outcome = place.loracle("baseline", place.config, "--out", run, *settings(**changes))
    assert outcome.code == 0, outcome.err
    line = (
        "8 of 24 records are left out: prompt longer than data.max_tokens 256 allows "
        "(rows 1, 2, 3, 4, 5, ...)"
    )
    assert f"warning: {line}" in outcome.err.splitlines()
    assert "1 column not read: system (1 record, row 10)" in outcome.err.splitlines()
    assert load(run / "data.json")["warnings"] == [line]
    assert load(run / "result.json")["data_warnings"] == [line]
    assert "8 of 24 records are left out" in outcome.out
    table = place.loracle("report", run, "--markdown")
    assert f"Warning: {line}." in table.out
