"""The table of several seeds: what it says, where it comes from, and what it refuses to mix."""

import copy
import json
import re
from functools import partial
from pathlib import Path

import pytest

from loracle.cli.main import app, run
from loracle.errors import RunFolderError
from loracle.records.files import to_json
from loracle.records.find_runs import read_results, without_seed
from loracle.report import study_markdown
from loracle.report.tables.baseline import baseline_table

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "results" / "demo"


@pytest.fixture(scope="module")
def recorded():
    return [to_json(result) for result in read_results(RECORDED)]


@pytest.fixture
def place(recorded, tmp_path):
    """Writes results as finished runs and returns their folder."""

    def write(*results):
        for number, result in enumerate(results):
            folder = tmp_path / "runs" / f"run-{number}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text("")
            (folder / "status.json").write_text(json.dumps({"status": "completed"}))
            (folder / "result.json").write_text(json.dumps(result))
        return tmp_path / "runs"

    return write


def seeded(result, *, seed, perplexity):
    other = copy.deepcopy(result)
    other["seed"] = seed
    other["signature"] = re.sub(r"\|seed:\d+", f"|seed:{seed}", other["signature"])
    other["quality"]["base"]["perplexity"] = 10.0
    other["quality"]["tuned"]["perplexity"] = perplexity
    return other


def row(table, name):
    return next(line for line in table.splitlines() if line.startswith(f"| {name} |"))


def in_readme(source):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split(f"<!-- {source} -->")[1].split("<!-- end -->")[0].strip()


def test_the_readme_shows_the_table_of_the_recorded_runs():
    assert in_readme("loracle report results/demo --markdown") == baseline_table(
        read_results(RECORDED)
    )


def test_the_readme_shows_the_verdicts_and_orderings_of_the_recorded_study():
    verdicts = study_markdown(ROOT / "results" / "placement_study").strip()
    assert in_readme("loracle report results/placement_study --markdown") == verdicts
    orderings = "results/placement_study/report/tables/orderings.md"
    assert in_readme(orderings) == (ROOT / orderings).read_text(encoding="utf-8").strip()


def test_the_recorded_runs_follow_from_their_own_examples(recorded):
    for result, path in zip(recorded, sorted(RECORDED.glob("seed-*")), strict=True):
        lines = (path / "examples.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        tokens = sum(row["tokens"] for row in rows)
        for model, key in (("tuned", "nll_sum_nats"), ("base", "base_nll_sum_nats")):
            loss = sum(row[key] for row in rows) / tokens
            assert result["quality"][model]["loss_nats_per_token"] == pytest.approx(loss, rel=1e-12)


def test_seeds_become_a_mean_and_a_range(recorded, place):
    folder = place(
        seeded(recorded[0], seed=2, perplexity=9.0), seeded(recorded[0], seed=1, perplexity=8.0)
    )
    table = baseline_table(read_results(folder))
    assert row(table, "perplexity") == (
        "| perplexity | 10.000 | 8.500 [8.000 to 9.000] | -15.0% [-20.0% to -10.0%] |"
    )
    assert "n = 2 seed(s) (1, 2)" in table
    assert "|seed:" not in table.split("Signature:")[1]


def test_what_was_not_measured_is_not_available(recorded, place):
    bare = copy.deepcopy(recorded[0])
    bare["quality"]["tuned"]["bleu"] = None
    bare["efficiency"]["epoch_time_s"] = None
    table = baseline_table(read_results(place(bare)))
    assert row(table, "BLEU").endswith("| n/a | n/a |")
    assert row(table, "time per epoch, s") == "| time per epoch, s | n/a |"


def test_runs_that_differ_in_more_than_the_seed_share_no_table(recorded, place):
    other = copy.deepcopy(recorded[0])
    other["signature"] = re.sub(r"\|r:\d+", "|r:8", other["signature"])
    with pytest.raises(RunFolderError, match=r"do not belong in one table \(r: .*\)$"):
        read_results(place(recorded[0], other))


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no finished run in it"):
        read_results(tmp_path)


def test_signatures_of_two_seeds_are_one_family():
    assert without_seed("a:1|seed:0|b:2") == without_seed("a:1|seed:31|b:2") == "a:1|b:2"


def test_the_command_prints_one_run_as_its_own_table_and_several_as_one(recorded, place, capsys):
    first = place(recorded[0])
    assert run(partial(app, ["report", str(first)])) == 0
    assert "Success criteria" in capsys.readouterr().out
    assert run(partial(app, ["report", str(first), "--markdown"])) == 0
    assert capsys.readouterr().out == baseline_table(read_results(first)) + "\n"
