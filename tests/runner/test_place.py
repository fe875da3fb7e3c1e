"""Relative sources of a record mean the same from every folder, and name no user or machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loracle.runner.place import place_of, recorded_start
from loracle.sources.spec import absolute, paths_from, portable, start_folder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A home of one user, folders in it and beside it, and a folder to work in."""
    root = tmp_path.resolve()
    for name in ("home/ann/project", "home/ann/runs", "srv/runs", "srv/project/deep"):
        (root / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(root / "home" / "ann"))
    return root


@pytest.mark.parametrize(
    ("work", "record", "written"),
    [
        ("srv/project", "srv/project/runs/a", "../.."),
        ("srv/project", "srv/runs/a", "../../project"),
        ("home/ann/project", "home/ann/project/runs/a", "../.."),
        ("home/ann/project", "home/ann/runs/a", "../../project"),
        ("home/ann/project", "srv/runs/a", "~/project"),
        ("home/ann", "srv/runs/a", "~"),
        ("srv/project", "home/ann/runs/a", "../../../../srv/project"),
    ],
)
def test_the_start_is_found_again_from_anywhere(root, monkeypatch, work, record, written):
    monkeypatch.chdir(root / work)
    folder = root / record
    folder.mkdir(parents=True, exist_ok=True)
    model = portable(f"path:{root}/srv/model")
    assert recorded_start(folder) == written
    assert "ann" not in written
    (folder / "environment.json").write_text(json.dumps({"paths_from": recorded_start(folder)}))
    (folder / "config.yaml").write_text(f"model: {model}\ndata: {{source: 'path:~/data.json'}}\n")
    monkeypatch.chdir(root / "srv" / "project" / "deep")
    with place_of(folder):
        assert start_folder() == root / work
        assert recorded_start(folder) == written
        assert portable(f"path:{root}/srv/model") == model
        assert absolute(model) == f"path:{root}/srv/model"
    assert start_folder() == Path.cwd()


def test_a_record_that_moves_with_its_sources_finds_them(root, monkeypatch):
    monkeypatch.chdir(root / "srv" / "project")
    folder = root / "srv" / "project" / "runs"
    folder.mkdir()
    config = "config: {model: demo, data: {source: 'path:data.json'}}"
    (folder / "study.yaml").write_text(f"paths_from: {recorded_start(folder)}\n{config}\n")
    (root / "srv" / "project" / "data.json").touch()
    (root / "srv" / "project").rename(root / "home" / "ann" / "moved")
    monkeypatch.chdir(root)
    with place_of(root / "home" / "ann" / "moved" / "runs"):
        assert absolute("path:data.json") == f"path:{root}/home/ann/moved/data.json"


def test_a_copy_without_its_sources_finds_them_from_here(root, monkeypatch):
    monkeypatch.chdir(root / "srv" / "project")
    copy = root / "home" / "copy"
    copy.mkdir()
    (copy / "environment.json").write_text('{"paths_from": "../.."}')
    (copy / "config.yaml").write_text("model: path:../model\n")
    with place_of(copy):
        assert absolute("path:../model") == f"path:{root.parent}/model"
    (root / "srv" / "model").mkdir()
    with place_of(copy):
        assert absolute("path:../model") == f"path:{root}/srv/model"


def test_without_a_record_paths_start_here(root, monkeypatch):
    monkeypatch.chdir(root / "srv")
    with place_of(root / "srv" / "none"):
        assert absolute("path:m") == f"path:{root}/srv/m"
    (root / "srv" / "environment.json").write_text("{}")
    with place_of(root / "srv"):
        assert start_folder() == root / "srv"


def test_without_a_home_everything_is_recorded_from_the_start(root, monkeypatch):
    from loracle.errors import SourceError
    from loracle.runner.tracking import _netrc_hosts
    from loracle.sources import cache_folder

    def nobody(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr(Path, "expanduser", lambda path: nobody() if str(path)[0] == "~" else path)
    monkeypatch.chdir(root / "home" / "ann" / "project")
    assert portable(f"path:{root}/srv/m") == "path:../../../srv/m"
    assert recorded_start(root / "srv") == "../home/ann/project"
    assert _netrc_hosts() == []
    monkeypatch.setenv("LORACLE_CACHE", str(root / "cache"))
    assert cache_folder() == root / "cache"
    monkeypatch.delenv("LORACLE_CACHE")
    with pytest.raises(SourceError, match="no home folder here; set LORACLE_CACHE to another"):
        cache_folder()
    (root / "srv" / "environment.json").write_text('{"paths_from": "~/project"}')
    (root / "srv" / "config.yaml").write_text("model: demo\n")
    with place_of(root / "srv"):
        assert start_folder() == Path.cwd()


def test_a_context_inside_another_ends_with_the_outer_one(root):
    with paths_from(root / "srv"), paths_from(root / "home"):
        assert start_folder() == root / "home"
    assert start_folder() == Path.cwd()


STUDY = """\
question: Where?
base: {base}
reference: all-linear
budget: equal-parameters
seeds: [0, 1]
arms:
  all-linear:
  attention:
"""


def test_a_study_that_goes_on_from_elsewhere_has_the_same_runs(place, tmp_path):
    from loracle.runner.place import absolute_config
    from loracle.study.file import load_study
    from loracle.study.run import keep_plan, prepare_study

    file, out = place.work / "where.yaml", tmp_path / "study"
    file.write_text(STUDY.format(base=place.config))
    ids = []
    for folder in (place.work, tmp_path):
        with replace(place, work=folder).entered():
            study, base = load_study(str(file))
            base = absolute_config(base)
            with place_of(out):
                plan = prepare_study(study, base=base, name="where", out=out)
                keep_plan(plan, out=out)
            ids.append([run.id for run in plan.runs])
        assert "paths_from: ~/work" in (out / "study.yaml").read_text()
    assert ids[0] == ids[1]
