import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loracle.config.files import load_config, read_yaml
from loracle.config.run import Config
from loracle.errors import NonFiniteError, RunFolderError
from loracle.records.files import read_jsonl
from loracle.records.rows import contents_up_to
from loracle.records.run_folder import RunFolder
from loracle.records.run_state import recorded_config


@pytest.fixture
def config() -> Config:
    return load_config("demo")


def one_line(caught: pytest.ExceptionInfo[RunFolderError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_a_new_run_holds_its_resolved_config_and_is_running(tmp_path, config):
    with RunFolder.create(tmp_path / "runs" / "a", config=config) as run:
        assert recorded_config(run.path) == config
        assert list(read_yaml(run.path / "config.yaml")) == list(config.model_dump())
        status = run.read_json("status.json")
    assert list(status) == ["status", "phase", "step", "max_steps", "error", "updated_at"]
    assert status["status"] == "running"
    assert status["max_steps"] == config.train.max_steps
    assert status["updated_at"].endswith("+00:00")


def test_an_empty_folder_may_become_a_run(tmp_path, config):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.7.tmp").write_text("half")
    with RunFolder.create(tmp_path, config=config) as run:
        assert not run.is_finished


def test_a_finished_run_is_never_overwritten(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config) as run:
        run.write_json("result.json", {"schema": 1})
        run.set_status("completed", step=60)
        with pytest.raises(RunFolderError, match=r"result\.json is never overwritten"):
            run.write_json("result.json", {"schema": 2})
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(tmp_path / "a", config=config)
    assert "holds a finished run, which is never overwritten" in one_line(caught)

    status = (tmp_path / "a" / "status.json").read_bytes()
    with RunFolder.reopen(tmp_path / "a", config=config) as run:
        assert run.is_finished
        assert run.read_json("result.json") == {"schema": 1}
        for write in (
            lambda: run.append_step({"step": 61}),
            lambda: run.set_status("running"),
            lambda: run.write_jsonl("examples.jsonl", []),
            lambda: run.write_yaml("config.yaml", {}),
        ):
            with pytest.raises(RunFolderError, match="finished"):
                write()
    assert (tmp_path / "a" / "status.json").read_bytes() == status
    assert not (tmp_path / "a" / "steps.jsonl").exists()


def test_an_unfinished_run_is_not_started_over(tmp_path, config):
    RunFolder.create(tmp_path / "a", config=config).close()
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(tmp_path / "a", config=config)
    assert "holds an unfinished run; --resume continues it" in one_line(caught)


def test_a_folder_of_something_else_is_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(tmp_path, config=config)
    assert "holds 'thesis.tex' and is not a run folder" in one_line(caught)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_named(tmp_path, config):
    (tmp_path / "a").write_text("x")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(RunFolderError) as caught:
            RunFolder.create(path, config=config)
        assert f"{path}: cannot be written: a file is where a folder" in one_line(caught)


def test_a_disk_that_is_full_at_the_start_leaves_a_folder_that_can_be_used_later(
    tmp_path, config, monkeypatch
):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError) as caught:
            RunFolder.create(tmp_path / "a", config=config)
    assert "/a/manifest.json: cannot be written: the disk is full" in one_line(caught)
    RunFolder.create(tmp_path / "a", config=config).close()


def test_a_real_full_device_is_reported_when_a_line_is_added(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config) as run:
        (run.path / "steps.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunFolderError) as caught:
            run.append_step({"step": 1})
    assert "steps.jsonl: cannot be written: the disk is full" in one_line(caught)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path, config):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="no permission"):
        RunFolder.create(tmp_path / "a", config=config)


def test_resuming_needs_a_run(tmp_path, config):
    with pytest.raises(RunFolderError) as caught:
        RunFolder.reopen(tmp_path / "a", config=config)
    assert "no run here to resume" in one_line(caught)
    assert not (tmp_path / "a").exists()


def test_resuming_with_another_configuration_lists_what_differs(tmp_path, config):
    RunFolder.create(tmp_path / "a", config=config).close()
    other = load_config("demo", overrides=["lora.rank=8", "seed=1"])
    with pytest.raises(RunFolderError) as caught:
        RunFolder.reopen(tmp_path / "a", config=other)
    assert "lora.rank: 16 -> 8; seed: 0 -> 1" in one_line(caught)
    assert recorded_config(tmp_path / "a") == config


def test_resuming_may_change_how_a_run_is_kept_and_watched(tmp_path, config):
    RunFolder.create(tmp_path / "a", config=config).close()
    other = load_config("demo", overrides=["checkpoint.keep=5", "tracking.mode=disabled"])
    with RunFolder.reopen(tmp_path / "a", config=other) as run:
        assert run.config.checkpoint.keep == 5
    assert recorded_config(tmp_path / "a") == other
    with RunFolder.reopen(tmp_path / "a") as run:
        assert run.config == other


def test_a_run_killed_before_its_status_was_written_can_be_resumed(tmp_path, config):
    RunFolder.create(tmp_path / "a", config=config).close()
    (tmp_path / "a" / "status.json").unlink()
    (tmp_path / "a" / ".status.json.7.tmp").write_text("{")
    with RunFolder.reopen(tmp_path / "a", config=config) as run:
        assert run.status["status"] == "running"
    assert not list((tmp_path / "a").glob(".*.tmp"))


def test_one_process_per_run_folder(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config):
        with pytest.raises(RunFolderError) as caught:
            RunFolder.reopen(tmp_path / "a", config=config)
        assert "in use by another process" in one_line(caught)
    RunFolder.reopen(tmp_path / "a", config=config).close()


def test_a_failed_start_lets_go_of_the_folder(tmp_path, config):
    RunFolder.create(tmp_path / "a", config=config).close()
    sound = (tmp_path / "a" / "config.yaml").read_bytes()
    (tmp_path / "a" / "config.yaml").write_text("{")
    with pytest.raises(RunFolderError, match=r"a/config\.yaml: is not what was written"):
        RunFolder.reopen(tmp_path / "a", config=config)
    (tmp_path / "a" / "config.yaml").write_bytes(sound)
    RunFolder.reopen(tmp_path / "a", config=config).close()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"status": "compleued"}'])
def test_a_damaged_status_of_an_unfinished_run_is_said_and_written_again(tmp_path, config, content):
    RunFolder.create(tmp_path / "a", config=config).close()
    (tmp_path / "a" / "status.json").write_text(content)
    with RunFolder.reopen(tmp_path / "a", config=config) as run:
        (said,) = run.notices
        assert "status.json" in said
        assert said.endswith("; taken as unfinished")
        assert run.read_json("status.json")["status"] == "running"


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, config, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    RunFolder.create(tmp_path / "a", config=config).close()


def test_a_lock_that_fails_otherwise_is_reported(tmp_path, config, monkeypatch):
    def failing_disk(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", failing_disk)
    with pytest.raises(RunFolderError, match="Input/output error"):
        RunFolder.create(tmp_path / "a", config=config)


def test_status_keeps_what_is_not_given_and_forgets_an_old_error(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config) as run:
        run.set_status("failed", phase="train", step=7, error="loss is nan")
        assert run.status["error"] == "loss is nan"
        run.set_status("interrupted", step=8)
        assert run.read_json("status.json") == run.status
        kept = {key: run.status[key] for key in ("status", "phase", "step", "max_steps", "error")}
    assert kept == {
        "status": "interrupted", "phase": "train", "step": 8, "max_steps": 60, "error": None,
    }  # fmt: skip


def test_rewinding_keeps_the_rows_up_to_the_checkpoint(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config) as run:
        run.append_eval({"step": 0, "loss": 2.0})
        for step in range(1, 8):
            run.append_step({"step": step, "loss": 1 / step})
        run.append_eval({"step": 5, "loss": 1.0})
    with (tmp_path / "a" / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    with RunFolder.reopen(tmp_path / "a", config=config) as run:
        run.put_back(contents_up_to(run.path, step=4))
        run.append_step({"step": 5, "loss": 0.25})
        assert [row["step"] for row in run.steps()] == [1, 2, 3, 4, 5]
        assert run.steps()[3]["loss"] == 1 / 4
        assert [row["step"] for row in run.evals()] == [0]
        run.put_back({})
        assert run.steps() == run.evals() == []


def test_a_row_added_after_a_cut_line_does_not_join_it(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config) as run:
        run.append_step({"step": 1})
    with (tmp_path / "a" / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 2')
    with RunFolder.reopen(tmp_path / "a", config=config) as run:
        run.append_step({"step": 2})
        assert run.steps() == [{"step": 1}, {"step": 2}]


def test_nan_never_reaches_a_file(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config) as run:
        with pytest.raises(NonFiniteError, match=r"steps\.jsonl, step 3: loss is nan"):
            run.append_step({"step": 3, "loss": float("nan")})
        with pytest.raises(NonFiniteError, match=r"examples\.jsonl:2: nll_sum_nats is inf"):
            run.write_jsonl(
                "examples.jsonl", [{"nll_sum_nats": 1.0}, {"nll_sum_nats": float("inf")}]
            )
        assert run.steps() == read_jsonl(run.path / "examples.jsonl") == []


def test_files_are_utf8_indented_and_in_the_given_order(tmp_path, config):
    with RunFolder.create(tmp_path / "a", config=config) as run:
        run.write_json("data.json", {"z": "日本", "a": None})
        run.write_jsonl("examples.jsonl", [{"instruction": "Größe?\nJa"}, {"instruction": "b"}])
        assert read_jsonl(run.path / "examples.jsonl")[0] == {"instruction": "Größe?\nJa"}
        text = (run.path / "data.json").read_bytes().decode()
    assert text == '{\n  "z": "日本",\n  "a": null\n}\n'


WRITER = """
import sys
from pathlib import Path
from loracle.config.files import load_config
from loracle.records.rows import contents_up_to
from loracle.records.run_folder import RunFolder
run = RunFolder.create(Path(sys.argv[1]), config=load_config("demo"))
print("ready", flush=True)
step = 0
while True:
    step += 1
    run.append_step({"step": step, "note": "x" * 2000})
    run.write_json("result.json", {"step": step, "copy": step, "text": "y" * 20000})
    run.set_status("running", step=step)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.1])
def test_a_run_killed_at_any_moment_stays_readable_and_free(tmp_path, config, delay_s):
    path = tmp_path / "a"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"ready\n"
        with pytest.raises(RunFolderError, match="in use by another process"):
            RunFolder.reopen(path, config=config)
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    rows = read_jsonl(path / "steps.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    result = path / "result.json"
    if result.exists():
        saved = json.loads(result.read_text())
        assert saved["step"] == saved["copy"]
        assert saved["step"] in (len(rows), len(rows) - 1)
    with RunFolder.reopen(path, config=config) as run:
        assert run.status["step"] in (None, len(rows), len(rows) - 1)
        run.append_step({"step": len(rows) + 1})
        assert len(run.steps()) == len(rows) + 1


def test_a_run_from_before_a_setting_existed_can_be_read():
    folder = next(Path("results/placement_study/runs").glob("all-linear-s0-*"))
    recorded = read_yaml(folder / "config.yaml")
    assert "clock_rounds" not in recorded["measure"]
    assert recorded_config(folder).measure.clock_rounds == 0


def test_the_record_imports_without_torch():
    code = "import sys, loracle.records.find_runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
