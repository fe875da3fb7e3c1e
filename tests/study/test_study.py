"""A whole tiny study: run, gone on with, killed, refused; what it leaves is what the plan says."""

import json
import random
import re
import shutil

import pytest

from loracle.analysis.rate_search import best_rates
from loracle.config.files import read_yaml
from loracle.errors import ModelError, RunFolderError
from loracle.records.study_folder import read_study
from loracle.report.tables.search import search_table
from loracle.report.terminal.progress import StudyProgress, last_step, run_state
from loracle.text import in_words
from runs_fixture import contents, facts, load

STUDY = """\
question: Does it matter where?
base: {base}
config:
  train: {{max_steps: 4}}
  eval: {{every_steps: 2, generate_examples: 2, max_new_tokens: 4}}
  checkpoint: {{every_steps: 2}}
  measure: {{skip_steps: 1, latency_trials: 0}}
  audit: {{reload_examples: 2}}
reference: all-linear
budget: equal-parameters
seeds: [0, 1]
noise: {{repeats: 1}}
arms:
  all-linear:
  attention:
  best: {{placement: {{strategic: gradient-energy, keep_frac: 0.4}}}}
"""


@pytest.fixture(scope="module")
def file(place):
    path = place.work / "tiny_study.yaml"
    path.write_text(STUDY.format(base=place.config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(place, file):
    """The folder of a study that ran to its end, and what it said; nobody writes in it."""
    folder = place.work / "studies" / "done"
    outcome = place.loracle("study", file, "--out", folder)
    assert outcome.code == 0, outcome.err
    return folder, outcome


def run_ids(folder):
    return [run["id"] for run in load(folder / "plan.json")["runs"]]


def all_facts(folder):
    return {name: facts(folder / "runs" / name) for name in run_ids(folder)}


def test_every_planned_run_is_there_under_its_arms_name(done):
    folder, _ = done
    study = read_study(folder)
    assert study.unfinished == ()
    assert len(study.runs) == 3 * 2 + 1
    for run in study.runs:
        assert run.result.arm == run.arm
        assert run.result.seed == run.seed
        assert len(run.steps) == 4
        assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
    assert set(study.runs_of("best")) == {0, 1}
    assert [run.arm for run in study.repeats_of("all-linear")] == ["all-linear"]


def test_the_plan_states_modules_ranks_and_counts_as_the_runs_have_them(done):
    study = read_study(done[0])
    for arm in study.arms:
        for run in study.runs_of(arm.name).values():
            recorded = load(run.path / "modules.json")
            assert list(arm.modules) == recorded["modules"]
            assert arm.trainable_params == recorded["trainable_params"]
            assert run.result.efficiency.trainable_params == arm.trainable_params


def test_a_repeat_has_the_bits_of_the_first(done):
    study = read_study(done[0])
    first = study.runs_of("all-linear")[0]
    (repeat,) = study.repeats_of("all-linear")
    assert facts(repeat.path) == facts(first.path)
    assert repeat.result.criteria.reproducibility.passed is True


def test_scores_are_kept_and_choose_the_strategic_arm(done):
    study = read_study(done[0])
    scores = study.scores["gradient-energy"]
    chosen = {module["name"] for module in study.arm("best").modules}
    worst_in = min(scores[name] for name in chosen)
    assert all(scores[name] <= worst_in for name in scores.keys() - chosen)


def test_it_says_where_each_run_ended_and_how_much_is_left(done):
    _, outcome = done
    assert re.search(r"all-linear-s0-\w{8}: perplexity \d+\.\d{3}; 1 of 7 runs done", outcome.err)
    assert "7 of 7 runs done" in outcome.err


def test_nothing_of_the_machine_is_in_what_it_leaves(done, place):
    folder, _ = done
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml", ".html", ".tex", ".md"):
            text = path.read_text(encoding="utf-8")
            assert str(place.home) not in text, path.name
            assert place.home.name not in text, path.name


def test_started_again_it_skips_everything(done, place, file):
    folder, _ = done
    before = contents(folder / "runs")
    outcome = place.loracle("study", file, "--out", folder)
    assert outcome.code == 0
    assert contents(folder / "runs") == before


def test_a_seed_more_runs_only_what_is_new(done, place, file, tmp_path, only_runs):
    folder = shutil.copytree(done[0], tmp_path / "more")
    before = contents(folder / "runs")
    outcome = place.loracle("study", file, "--out", folder, "--set", "seeds=[0, 1, 2]")
    assert outcome.code == 0, outcome.err
    after = contents(folder / "runs")
    assert len(run_ids(folder)) == 10
    assert {name: after[name] for name in before} == before


def test_another_study_in_the_folder_is_refused_and_nothing_is_touched(done, place, file):
    folder, _ = done
    before = contents(folder)
    outcome = place.loracle("study", file, "--out", folder, "--set", "train.max_steps=5")
    assert outcome.code == 2
    assert "holds another study (config.train.max_steps: 4 -> 5)" in outcome.err
    assert contents(folder) == before


def test_a_folder_of_something_else_is_refused(place, file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    outcome = place.loracle("study", file, "--out", tmp_path)
    assert outcome.code == 2
    assert "holds something that is not a study" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_runs_of_another_environment_do_not_share_a_table(done, place, file, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "elsewhere")
    first, *_, last = run_ids(folder)
    shutil.rmtree(folder / "runs" / last)
    path = folder / "runs" / first / "environment.json"
    environment = load(path)
    environment["versions"]["torch"] = "1.0.0"
    path.write_text(json.dumps(environment))
    # As an older version would have left it.
    (path.parent / "manifest.json").unlink()
    before = contents(folder / "runs")
    outcome = place.loracle("study", file, "--out", folder)
    assert outcome.code == 2
    assert "another environment (versions.torch: '1.0.0' ->" in outcome.err
    assert contents(folder / "runs") == before


def test_a_run_that_fails_is_recorded_and_the_others_go_on(
    place, file, tmp_path, monkeypatch, only_runs
):
    from loracle.runner import shared_base

    attach = shared_base.attach_adapter

    def refuse(base, *, plan, seed, **given):
        if plan.placement == "attention" and seed == 0:
            raise ModelError("PEFT put no adapter on it")
        return attach(base, plan=plan, seed=seed, **given)

    monkeypatch.setattr(shared_base, "attach_adapter", refuse)
    words = ("--set", "seeds=[0]", "--set", "interval=null", "--set", "noise.repeats=0")
    outcome = place.loracle("study", file, "--out", tmp_path / "one_fails", *words)
    assert outcome.code == 1
    study = read_study(tmp_path / "one_fails")
    (failed,) = study.unfinished
    assert (failed["arm"], failed["seed"], failed["status"]) == ("attention", 0, "failed")
    assert failed["error"] == "PEFT put no adapter on it"
    assert len(study.runs) == 2


def test_killed_at_five_moments_it_ends_with_the_same_bits(place, nursery, file, done, tmp_path):
    """SIGKILL at each kind of moment, and at one drawn by lot."""
    folder, draw = tmp_path / "killed", random.Random(0)
    words = ["study", file, "--out", folder]
    moments = (
        {"touching": "scores"},  # before any run
        {"step": 1, "delay_s": 0.01},  # inside a step, or just after it
        {"half": 3},  # inside a checkpoint
        {"touching": "result.json"},  # at the end of a run
        {"events": draw.randint(100, 200)},
    )
    for moment in moments:
        outcome = nursery.live(words, folder=folder, **moment)
        assert outcome.code == -9, (moment, outcome.err)
    assert nursery.live(words, folder=folder, only_runs=True).code == 0
    assert all_facts(folder) == all_facts(done[0])


def test_a_plan_shows_everything_and_runs_nothing(place, file, tmp_path):
    folder = tmp_path / "planned"
    outcome = place.loracle("study", file, "--out", folder, "--plan")
    assert outcome.code == 0, outcome.err
    for words in ("Does it matter where?", "best", "equal-parameters", "7 runs: 3 arms x 2 seeds"):
        assert words in outcome.out
    assert not folder.exists()


def test_a_search_finds_a_rate_for_every_arm_first(place, tmp_path, unmeasured):
    file = tmp_path / "search.yaml"
    text = STUDY.format(base=place.config).replace("seeds: [0, 1]", "seeds: [0, 1]\n" + SEARCH)
    file.write_text(re.sub(r"  best: .*\n", "", text).replace("noise: {repeats: 1}\n", ""))
    folder = tmp_path / "searched"
    outcome = place.loracle("study", file, "--out", folder)
    assert outcome.code == 0, outcome.err
    rates = {run["learning_rate"] for run in load(folder / "plan.json")["runs"]}
    assert rates == {0.003}
    assert len(list((folder / "runs").iterdir())) == 4 + 4
    study = read_study(folder)
    assert {run.learning_rate for run in study.search} == {1e-9, 0.003}
    table = search_table(study)
    assert [row[0] for row in table.rows] == ["all-linear", "attention"]
    assert [row[-2:] for row in table.rows] == [("0.003", "edge")] * 2
    assert all(float(row[2]) < float(row[1]) for row in table.rows), "by rising rate"
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Learning rates tried" in page
    assert "ends the grid that was searched" in page
    assert "in the learning rate that a search found for each" in page


SEARCH = "search: {learning_rates: [1.0e-9, 0.003], seed: 5}"


def test_a_study_folder_without_a_finished_run_is_no_study_to_read(done, tmp_path):
    with pytest.raises(RunFolderError, match=r"not a study \(no study.yaml"):
        read_study(tmp_path)
    folder = shutil.copytree(done[0], tmp_path / "unstarted")
    shutil.rmtree(folder / "runs")
    with pytest.raises(RunFolderError, match="none of the study's runs has completed yet"):
        read_study(folder)


def test_a_run_in_progress_is_read_where_it_stands(done, tmp_path):
    folder, _ = done
    run = shutil.copytree(folder / "runs" / run_ids(folder)[0], tmp_path / "run")
    assert (
        run_state(run)["perplexity"] == load(run / "result.json")["quality"]["tuned"]["perplexity"]
    )
    status = load(run / "status.json") | {"status": "running", "step": 0}
    (run / "status.json").write_text(json.dumps(status))
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": 99, "loss')
    state = run_state(run)
    assert (state["step"], state["max_steps"]) == (4, 4)
    assert state["loss"] == last_step(run / "steps.jsonl")["loss_nats_per_token"]
    assert run_state(tmp_path / "nowhere") == {}
    assert last_step(tmp_path / "nowhere") is None


def test_the_live_table_has_an_arm_per_row_and_a_seed_per_column(done, place, file):
    from rich.console import Console

    from loracle.study.file import load_study
    from loracle.study.run import prepare_study

    folder, _ = done
    with place.entered():
        study, base = load_study(file)
        plan = prepare_study(study, base=base, name="tiny_study", out=folder)
    console = Console(width=100, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(StudyProgress(plan, folder).view())
    shown = captured.get()
    for words in ("all-linear", "attention", "best", "seed 0", "seed 1", "repeat", "ppl"):
        assert words in shown
    assert "7 of 7 runs done" in shown


@pytest.mark.parametrize(
    ("seconds", "words"), [(20, "20 s"), (90, "2 min"), (3600, "1 h 0 min"), (9000, "2 h 30 min")]
)
def test_a_duration_reads_as_a_person_says_it(seconds, words):
    assert in_words(seconds) == words


def test_the_best_rate_has_the_lowest_validation_loss():
    trials = [("a", 0.1, 2.0), ("a", 0.2, 1.0), ("b", 0.1, 3.0), ("a", 0.3, 1.5)]
    assert best_rates(trials) == {"a": 0.2, "b": 0.1}


def test_the_recorded_study_is_the_file_with_its_base_resolved(done):
    recorded = read_yaml(done[0] / "study.yaml")
    assert recorded["question"] == "Does it matter where?"
    assert recorded["config"]["train"]["max_steps"] == 4
    assert recorded["config"]["model"].startswith("path:")


def test_what_a_plan_says_stands_beside_what_was_measured(done):
    folder, _ = done
    rows = load(folder / "predicted.json")["arms"]
    arms = load(folder / "plan.json")["arms"]
    assert [row["arm"] for row in rows] == [arm["name"] for arm in arms]
    for row in rows:
        assert row["memory_kind"] == "tensors"
        assert row["predicted_gib"] == pytest.approx(row["measured_gib"], rel=0.02)
        assert row["measured_step_s"] > 0
        assert row["predicted_step_s"] is None
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Predicted and measured" in page
    assert "error of memory: median" in page
