"""The table of several seeds: what it says, where it comes from, and what it refuses to mix."""

import copy
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from loracle.analysis.stats.paired import paired_difference
from loracle.cli.main import app, run
from loracle.errors import RunFolderError
from loracle.records.files import to_json
from loracle.records.find_runs import read_results, without_seed
from loracle.records.lone_runs import study_of_runs
from loracle.report import study_markdown
from loracle.report.tables.baseline import baseline_table

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "results" / "demo"


@pytest.fixture(scope="module")
def recorded():
    return study_of_runs(RECORDED)


@pytest.fixture(scope="module")
def results():
    return [to_json(result) for result in read_results(RECORDED)]


@pytest.fixture
def place(tmp_path):
    """Writes results as finished runs, beside the records of seed 0, and returns their folder."""

    def write(*results):
        for number, result in enumerate(results):
            folder = tmp_path / "runs" / f"run-{number}"
            shutil.copytree(RECORDED / "seed-0", folder)
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


def test_the_readme_shows_the_table_of_the_recorded_runs(recorded):
    assert in_readme("loracle report results/demo --markdown") == baseline_table(recorded)


def test_changes_carry_intervals_over_seeds_and_examples(recorded):
    runs = [run.examples for run in recorded.runs]
    tokens = np.array([row["tokens"] for row in runs[0]], dtype=float)
    tuned = [np.array([row["nll_sum_nats"] for row in rows]) for rows in runs]
    untuned = [np.array([row["base_nll_sum_nats"] for row in runs[0]])]
    loss = paired_difference(tuned, untuned, tokens)
    low, high = (100 * np.expm1(end) for end in (loss.low, loss.high))
    table = baseline_table(recorded)
    assert row(table, "perplexity").endswith(f"| -19.5 % [{low:+.1f}, {high:+.1f}] |")
    assert (round(low, 1), round(high, 1)) == (-20.7, -18.3)
    assert row(table, "BLEU").endswith("| +0.97 [-0.98, +2.92] |")
    assert row(table, "chrF").endswith("| +1.10 (no interval) |")
    lowest, highest = (100 * np.expm1((t - untuned[0]).sum() / tokens.sum()) for t in tuned)
    assert low < lowest < high
    assert low < highest < high


def test_the_readme_shows_the_verdicts_and_orderings_of_the_recorded_study():
    verdicts = study_markdown(ROOT / "results" / "placement_study").strip()
    assert in_readme("loracle report results/placement_study --markdown") == verdicts
    orderings = "results/placement_study/report/tables/orderings.md"
    assert in_readme(orderings) == (ROOT / orderings).read_text(encoding="utf-8").strip()


def test_the_recorded_runs_follow_from_their_own_examples(recorded):
    for seed in recorded.runs:
        rows, result = seed.examples, seed.result
        tokens = sum(row["tokens"] for row in rows)
        for model, key in (("tuned", "nll_sum_nats"), ("base", "base_nll_sum_nats")):
            loss = sum(row[key] for row in rows) / tokens
            assert result["quality"][model]["loss_nats_per_token"] == pytest.approx(loss, rel=1e-12)


def test_seeds_become_a_mean_and_a_range(results, place):
    folder = place(
        seeded(results[0], seed=2, perplexity=9.0), seeded(results[0], seed=1, perplexity=8.0)
    )
    table = baseline_table(study_of_runs(folder))
    assert row(table, "perplexity").startswith("| perplexity | 10.000 | 8.500 | ")
    assert "2 seeds (1, 2)" in table
    assert "|seed:" not in table.split("Signature:")[1]


def test_one_seed_has_no_interval(results, place):
    table = baseline_table(study_of_runs(place(results[0])))
    assert row(table, "perplexity").endswith("% (no interval) |")
    assert "Without a second seed there is no interval." in table


def test_what_was_not_measured_is_not_available(results, place):
    bare = copy.deepcopy(results[0])
    bare["quality"]["tuned"]["chrf"] = None
    bare["efficiency"]["epoch_time_s"] = None
    table = baseline_table(study_of_runs(place(bare)))
    assert row(table, "chrF").endswith("| n/a | n/a |")
    assert row(table, "time per epoch, s") == "| time per epoch, s | n/a |"


def test_runs_that_differ_in_more_than_the_seed_share_no_table(results, place):
    other = copy.deepcopy(results[0])
    other["signature"] = re.sub(r"\|r:\d+", "|r:8", other["signature"])
    with pytest.raises(RunFolderError, match=r"do not belong in one table \(r: .*\)$"):
        read_results(place(results[0], other))


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no finished run in it"):
        read_results(tmp_path)


def test_signatures_of_two_seeds_are_one_family():
    assert without_seed("a:1|seed:0|b:2") == without_seed("a:1|seed:31|b:2") == "a:1|b:2"


def test_the_command_prints_one_run_as_its_own_table_and_several_as_one(results, place, capsys):
    first = place(results[0])
    assert run(partial(app, ["report", str(first)])) == 0
    assert "Success criteria" in capsys.readouterr().out
    assert run(partial(app, ["report", str(first), "--markdown"])) == 0
    assert capsys.readouterr().out == baseline_table(study_of_runs(first)) + "\n"
