"""A run that is stopped anywhere, by anything, ends with the same bits as one that is not."""

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from runs_fixture import contents, copied, facts, load, rows, settings

# Checkpoints and validations often enough that something of each is always in the making.
LONG = {
    "train__max_steps": 12,
    "eval__every_steps": 4,
    "eval__generate_examples": 2,
    "measure__latency_trials": 0,
    "audit__reload_examples": 2,
    "checkpoint__every_steps": 2,
}


@pytest.fixture(scope="session")
def argv(place):
    """The words that run the long run, but for its folder."""
    return ["baseline", place.config, *settings(**LONG), "--out"]


@pytest.fixture(scope="session")
def uninterrupted(nursery, argv, tmp_path_factory):
    """What the long run comes to, and how often it touches its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert nursery.live([*argv, folder], folder=folder).code == 0
    events = int(folder.with_name("run.events").read_text())
    return facts(folder), events


@pytest.fixture(scope="session")
def stopped(nursery, argv, tmp_path_factory):
    """The long run, killed after 9 steps; nobody writes in it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert nursery.live([*argv, folder], folder=folder, step=9, delay_s=0.0).code == -9
    return folder


def steps_in_checkpoints(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-????????"))


# Caveat: SIGKILL ends a process, not a machine. What a power cut leaves on the disk is the business
# of fsync, whose calls and their order test_checkpoint and test_durable watch.
def test_killed_again_and_again_and_resumed_it_ends_with_the_same_bits(
    nursery, argv, uninterrupted, tmp_path
):
    """One life for each kind of moment; the next test has those inside a checkpoint."""
    expected, events = uninterrupted
    draw = random.Random(0)
    folder, resume = tmp_path / "run", []
    moments = (
        {"step": 1, "delay_s": draw.uniform(0, 0.03)},  # before the first checkpoint
        {"events": draw.randint(events // 4, events // 3)},  # at a touch of its folder
        {"step": 3, "delay_s": draw.uniform(0, 0.03)},  # inside a step, or a validation
        {"touching": "adapter_model"},  # in saving
        {"touching": "result.json"},  # in writing the result
    )
    for moment in moments:
        outcome = nursery.live([*argv, folder, *resume], folder=folder, **moment)
        assert outcome.code == -9, (moment, outcome.err)
        assert not (folder / "result.json").exists()
        resume = ["--resume"]
    outcome = nursery.live([*argv, folder, *resume], folder=folder)
    assert outcome.code == 0, outcome.err
    assert facts(folder) == expected


@pytest.mark.parametrize("nth", [6, 10])
def test_killed_in_a_half_written_checkpoint_the_one_before_it_is_used(
    nursery, argv, uninterrupted, tmp_path, nth
):
    """The 6th and the 10th file are the second checkpoint's tensors and its manifest."""
    folder = tmp_path / "run"
    assert nursery.live([*argv, folder], folder=folder, half=nth).code == -9
    (half,) = (folder / "checkpoints").glob("*.tmp")
    assert steps_in_checkpoints(folder) == [2]
    outcome = nursery.live([*argv, folder, "--resume"], folder=folder)
    assert outcome.code == 0
    said = outcome.err.splitlines()
    assert f"{half.name}: half-written checkpoint, ignored" in said
    assert "resuming after step 2 of 12" in said
    assert not half.exists()
    assert facts(folder) == uninterrupted[0]


def test_a_damaged_checkpoint_is_named_in_one_line_and_the_one_before_it_used(
    nursery, argv, stopped, uninterrupted, tmp_path
):
    folder = copied(stopped, tmp_path / "run")
    before, newest = steps_in_checkpoints(folder)
    tensors = folder / "checkpoints" / f"step-{newest:08d}" / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-100] ^= 1
    tensors.write_bytes(content)
    outcome = nursery.live([*argv, folder, "--resume"], folder=folder)
    assert outcome.code == 0
    said = outcome.err.splitlines()
    (notice,) = [line for line in said if "damaged checkpoint" in line]
    assert notice == (
        f"step-{newest:08d}: damaged checkpoint (state.safetensors is not what was written), "
        "the one before it is used"
    )
    assert f"resuming after step {before} of 12" in said
    assert facts(folder) == uninterrupted[0]


def rows_lost(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))


def rows_doubled(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[2], *lines[3:]]))


def digit_flipped(path):
    content = bytearray(path.read_bytes())
    at = next(n for n in range(len(content) // 2, len(content)) if chr(content[n]).isdigit())
    content[at] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "harms",
    [
        {"steps.jsonl": rows_lost, "evals.jsonl": emptied, "environment.json": digit_flipped},
        {"steps.jsonl": rows_doubled, "evals.jsonl": digit_flipped, "memory.json": emptied},
        {"steps.jsonl": digit_flipped, "status.json": emptied},
    ],
    ids=lambda harms: "-".join(harm.__name__ for harm in harms.values()),
)
def test_damaged_records_of_a_stopped_run_are_named_and_made_again(
    nursery, argv, stopped, uninterrupted, tmp_path, harms
):
    folder = copied(stopped, tmp_path / "run")
    for name, harm in harms.items():
        harm(folder / name)
    outcome = nursery.live([*argv, folder, "--resume"], folder=folder)
    assert outcome.code == 0, outcome.err
    said = [line for line in outcome.err.splitlines() if "not what was" in line or "taken" in line]
    assert len(said) == len(harms)
    for name in harms:
        assert any(name in line for line in said), said
    assert facts(folder) == uninterrupted[0]


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "modules.json", "manifest.json"])
def test_what_a_run_starts_from_is_never_taken_damaged(nursery, argv, stopped, tmp_path, name):
    folder = copied(stopped, tmp_path / "run")
    digit_flipped(folder / name)
    outcome = nursery.live([*argv, folder, "--resume"], folder=folder)
    assert outcome.code == 2
    assert f"run/{name}: is not what was written" in outcome.line


@pytest.mark.parametrize("name", ["result.json", "adapter"])
def test_what_lies_in_the_way_is_named_and_removing_it_goes_on(
    nursery, argv, stopped, uninterrupted, tmp_path, name
):
    folder = copied(stopped, tmp_path / "run")
    way = folder / name
    way.touch() if name == "adapter" else way.mkdir()
    outcome = nursery.live([*argv, folder, "--resume"], folder=folder)
    assert outcome.code == 2
    assert f"run/{name}" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    if name == "result.json":
        way.rmdir()
        assert nursery.live([*argv, folder, "--resume"], folder=folder).code == 0
        assert facts(folder) == uninterrupted[0]


def test_without_any_checkpoint_it_starts_over_in_the_same_folder(
    nursery, argv, stopped, uninterrupted, tmp_path
):
    folder = copied(stopped, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    assert nursery.live([*argv, folder, "--resume"], folder=folder).code == 0
    assert facts(folder) == uninterrupted[0]


def test_sigint_and_sigterm_end_the_command_with_130_after_a_checkpoint_of_the_current_step(
    place, nursery, argv, uninterrupted, tmp_path
):
    """One in a process as a shell starts it, frozen while the test looks at it; one in a life."""
    folder = tmp_path / signal.SIGINT.name
    process = start(place, argv, folder)
    try:
        freeze_after_a_step(process, folder)
        untouched = contents(folder)
        second = place.loracle(*words(argv, folder), "--resume")
        assert second.code == 2
        assert second.line.endswith("in use by another process; wait, or give another --out")
        assert contents(folder) == untouched
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    folder = tmp_path / signal.SIGTERM.name
    other = nursery.live(
        words(argv, folder), folder=folder, step=2, delay_s=0.0, signal=signal.SIGTERM
    )
    ends = {
        signal.SIGINT: (process.returncode, said),
        signal.SIGTERM: (other.code, other.err),
    }
    for number, (code, said) in ends.items():
        assert code == 130, said
        assert said.splitlines()[-1] == f"Interrupted: interrupted by {number.name}"
        folder = tmp_path / number.name
        status = load(folder / "status.json")
        assert status["status"] == "interrupted"
        assert status["error"] == f"interrupted by {number.name}"
        done = len(rows(folder / "steps.jsonl"))
        assert 1 <= done < 12
        assert steps_in_checkpoints(folder) == [done]
        assert not (folder / "result.json").exists()
        outcome = nursery.live([*words(argv, folder), "--resume"], folder=folder)
        assert outcome.code == 0
        assert f"resuming after step {done} of 12" in outcome.err.splitlines()
        assert facts(folder) == uninterrupted[0]


def words(argv, folder):
    """The long run in this folder, without a checkpoint before the last step."""
    return [*map(str, argv), str(folder), *settings(checkpoint__every_steps=1000)]


def start(place, argv, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "loracle", *words(argv, folder)],
        cwd=place.work,
        env=place.environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def freeze_after_a_step(process, folder):
    while process.poll() is None and not rows_so_far(folder):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)


def rows_so_far(folder):
    path = folder / "steps.jsonl"
    return path.exists() and b"\n" in path.read_bytes()


STAGES = {
    "untuned.score_examples": 0,
    "evaluation.score_adapters": 4,
    "untuned.answer_prompts": 8,
    "evaluation.answer_with_adapters": 8,
    "probe.measure_latency": 8,
    "finish.audit_run": 8,
}


def test_a_signal_is_honoured_in_every_stage_and_costs_nothing(
    place, finished, tmp_path, monkeypatch
):
    """One run that is interrupted in each of its stages, and resumed each time."""
    folder, resume = tmp_path / "run", []
    place.forget()
    for stage, step in STAGES.items():
        home, _, name = stage.partition(".")
        module = importlib.import_module(f"loracle.runner.{home}")
        whole, calls = getattr(module, name), []

        def signalled(*args, whole=whole, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == 1:
                signal.raise_signal(signal.SIGINT)
            return whole(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, signalled)
            assert place.baseline("--out", folder, *resume).code == 130, stage
        assert load(folder / "status.json")["status"] == "interrupted"
        assert steps_in_checkpoints(folder)[-1] == step
        assert not (folder / "result.json").exists()
        resume = ["--resume"]
    assert place.baseline("--out", folder, *resume).code == 0
    assert facts(folder) == facts(finished)


def test_resuming_a_finished_run_shows_its_table_and_changes_nothing(place, finished):
    untouched = contents(finished)
    outcome = place.baseline("--out", finished, "--resume", tracking__mode="offline")
    assert outcome.code == 0
    assert outcome.err == ""
    result = load(finished / "result.json")
    assert f"{result['quality']['tuned']['perplexity']:.3f}" in outcome.out
    assert "Success criteria" in outcome.out
    assert contents(finished) == untouched


def test_a_finished_run_is_never_overwritten(place, finished):
    untouched = contents(finished)
    outcome = place.baseline("--out", finished)
    assert outcome.code == 2
    assert outcome.line == (
        f"RunFolderError: {finished}: holds a finished run, which is never overwritten"
    )
    assert contents(finished) == untouched


def test_an_unfinished_run_is_only_continued_when_asked(place, stopped):
    untouched = contents(stopped)
    outcome = place.loracle("baseline", place.config, *settings(**LONG), "--out", stopped)
    assert outcome.code == 2
    assert outcome.line.endswith("holds an unfinished run; --resume continues it")
    assert contents(stopped) == untouched


def test_a_folder_of_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    untouched = contents(tmp_path)
    outcome = place.baseline("--out", tmp_path)
    assert outcome.code == 2
    assert "holds 'thesis.tex' and is not a run folder" in outcome.line
    assert contents(tmp_path) == untouched
    outcome = place.baseline("--out", tmp_path, "--resume")
    assert outcome.code == 2
    assert outcome.line.endswith("no run here to resume (it has no config.yaml)")
    assert contents(tmp_path) == untouched


@pytest.mark.parametrize("run", ["stopped", "finished"])
def test_another_configuration_cannot_resume_and_the_keys_are_listed(place, request, run):
    folder = request.getfixturevalue(run)
    untouched = contents(folder)
    changes = (LONG if run == "stopped" else {}) | {"lora__rank": 8, "data__max_tokens": 200}
    outcome = place.loracle(
        "baseline", place.config, *settings(**changes), "--out", folder, "--resume"
    )
    assert outcome.code == 2
    assert "data.max_tokens: 256 -> 200; lora.rank: 16 -> 8" in outcome.line
    assert contents(folder) == untouched


def test_data_that_changed_since_cannot_be_resumed_on(place, stopped, tmp_path):
    folder = copied(stopped, tmp_path / "run")
    state = {path: contents(folder / path) for path in ("checkpoints",)}
    steps = (folder / "steps.jsonl").read_bytes()
    original = place.data.read_text()
    place.data.write_text(original.replace("Paris", "Rome"))
    try:
        outcome = place.loracle(
            "baseline", place.config, *settings(**LONG), "--out", folder, "--resume"
        )
    finally:
        place.data.write_text(original)
    assert outcome.code == 2
    assert outcome.line.startswith("RunFolderError: run: the data changed since the run began")
    assert {path: contents(folder / path) for path in ("checkpoints",)} == state
    assert (folder / "steps.jsonl").read_bytes() == steps


def test_without_a_folder_the_newest_unfinished_run_of_the_configuration_goes_on(
    place, tmp_path, monkeypatch
):
    from loracle.cli import main as cli
    from loracle.runner import finish
    from loracle.runner import probe as isolated

    monkeypatch.setattr(cli, "RUNS", tmp_path)
    assert place.baseline("--resume").line == (
        f"RunFolderError: {tmp_path}: no unfinished run of this configuration; name one with --out"
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            isolated, "measure_latency", lambda *_, **__: {"unmerged": os.kill(os.getpid(), 2)}
        )
        patch.setattr(finish, "audit_run", lambda *_, progress, **__: progress(1))
        assert place.baseline().code == 130
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name.startswith("tiny-20")
    # How it is kept and tracked may differ from before.
    outcome = place.baseline("--resume", checkpoint__keep=1)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == f"Recorded in {folder}"
    assert load(folder / "status.json")["status"] == "completed"
