import os
import re

import pytest

from loracle.config.files import load_config
from loracle.errors import RunFolderError
from loracle.records.find_runs import (
    completed_runs,
    find_resumable,
    new_run_path,
    read_results,
    sound_results,
)
from loracle.records.result import read_result
from loracle.records.run_folder import RunFolder
from runs_fixture import copied


def start(path, *, status=None, overrides=(), started_at_s=None):
    with RunFolder.create(path, config=load_config("demo", overrides=overrides)) as run:
        if status:
            run.set_status(status)
    if started_at_s:
        os.utime(path / ".lock", (started_at_s, started_at_s))
    return path


def test_a_new_path_is_named_after_the_run_and_the_time_and_is_free(tmp_path):
    first = new_run_path(tmp_path, name="demo")
    assert re.fullmatch(r"demo-\d{8}-\d{6}", first.name)
    assert not first.exists()


def test_paths_of_the_same_second_differ(tmp_path, monkeypatch):
    names = set()
    for _ in range(4):
        path = new_run_path(tmp_path, name="demo")
        path.mkdir()
        names.add(path.name)
    assert len(names) == 4


@pytest.mark.parametrize(
    ("name", "slug"),
    [("../etc/passwd", "etc-passwd"), ("a b/c", "a-b-c"), ("...", "run"), ("q,v_r8", "q-v_r8")],
)
def test_a_name_never_leaves_the_root(tmp_path, name, slug):
    path = new_run_path(tmp_path, name=name)
    assert path.parent == tmp_path
    assert path.name.startswith(f"{slug}-2")


def test_the_newest_unfinished_run_of_the_same_config_is_resumed(tmp_path):
    start(tmp_path / "z-old", started_at_s=1000)
    newest = start(tmp_path / "a-new", status="interrupted", started_at_s=2000)
    start(tmp_path / "done", status="completed", started_at_s=3000)
    start(tmp_path / "other", overrides=["seed=1"], started_at_s=4000)
    kept_otherwise = load_config("demo", overrides=["checkpoint.keep=9"])
    assert find_resumable(tmp_path, config=kept_otherwise) == newest


def test_damaged_runs_do_not_hide_the_others(tmp_path):
    good = start(tmp_path / "good", status="failed")
    start(tmp_path / "bad-status")
    (tmp_path / "bad-status" / "status.json").write_text("{")
    start(tmp_path / "bad-config")
    (tmp_path / "bad-config" / "config.yaml").write_text("nonsense: 1\n")
    assert find_resumable(tmp_path, config=load_config("demo")) == good


def test_nothing_to_resume_is_none(tmp_path):
    assert find_resumable(tmp_path / "absent", config=load_config("demo")) is None
    start(tmp_path / "done", status="completed")
    assert find_resumable(tmp_path, config=load_config("demo")) is None


def test_completed_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path):
    outer = start(tmp_path / "study" / "arm-b-0")
    start(outer / "inner", status="completed")
    with RunFolder.reopen(outer) as run:
        run.set_status("completed")
    second = start(tmp_path / "study" / "arm-a-0", status="completed")
    start(tmp_path / "running")
    assert list(completed_runs(tmp_path)) == [second, outer]


def test_a_damaged_run_is_named_by_a_report_and_passed_over_by_its_neighbours(finished, tmp_path):
    sound, damaged = (copied(finished, tmp_path / name) for name in ("a", "b"))
    (damaged / "evals.jsonl").write_bytes(b"")
    signature = read_result(finished).signature
    assert [path for path, _ in sound_results(tmp_path, signature=signature)] == [sound]
    assert not [*sound_results(tmp_path, signature=f"{signature}|other:1")]
    with pytest.raises(RunFolderError, match=r"b/evals\.jsonl: is not what was written"):
        read_results(tmp_path)
    (damaged / "status.json").write_text('{"status": "compleued"}')
    assert [path for path, _ in sound_results(tmp_path, signature=signature)] == [sound]
    with pytest.raises(RunFolderError, match=r"b/status\.json: is not what was written"):
        list(completed_runs(tmp_path))
