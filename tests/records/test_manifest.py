"""Records vouch for themselves: whatever differs from what was written is named, and refused."""

import json
import shutil

import pytest

from analysis.stats.simulated import SimulatedArm, write_study
from loracle.config.files import dump_yaml, read_yaml
from loracle.errors import RunFolderError
from loracle.records.files import read_json
from loracle.records.manifest import (
    Manifest,
    faults_of,
    read_manifest,
    require_intact,
    write_records,
)
from loracle.records.names import RUN_RECORDS, STUDY_RECORDS
from loracle.records.study_folder import drop_damaged, read_study, write_plan
from runs_fixture import copied


def flip(path, *, at=0.5):
    """Flips the lowest bit of one byte: often of a digit, so that the file still reads."""
    content = bytearray(path.read_bytes())
    digits = [index for index, byte in enumerate(content) if chr(byte).isdigit()]
    content[digits[int(at * (len(digits) - 1))]] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


HARMS = {"flip": flip, "truncate": truncate, "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("name", [*RUN_RECORDS, "status.json"])
@pytest.mark.parametrize("harm", [*HARMS, "remove"])
def test_damage_to_a_finished_run_is_named_by_the_report_and_by_a_restart(
    place, finished, tmp_path, name, harm
):
    run = tmp_path / "run"
    run.mkdir()
    for file in finished.iterdir():
        if file.is_file():
            shutil.copy2(file, run / file.name)
    (run / name).unlink() if harm == "remove" else HARMS[harm](run / name)
    reported = place.loracle("report", run)
    assert reported.code == 2
    assert f"run/{name}: " in reported.line
    assert reported.out == ""
    if harm != "flip":
        return
    again = place.baseline("--out", run, "--resume", tracking__mode="offline")
    assert again.code == 2
    assert name in again.line or "no run here to resume" in again.line


def test_a_damaged_manifest_is_told_from_damaged_records(place, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    flip(run / "manifest.json")
    line = place.loracle("report", run).line
    assert line.startswith(f"RunFolderError: {run}/manifest.json: is not what was written")
    assert line.endswith("remove it to read the folder without verification")
    (run / "manifest.json").unlink()
    outcome = place.loracle("report", run)
    assert outcome.code == 0
    assert outcome.line.endswith(
        "1 of 1 runs cannot be verified: an older version wrote them, without manifest.json"
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_answers_nothing(place, finished, tmp_path, name):
    run = copied(finished, tmp_path / "run")
    flip(run / "adapter" / name)
    outcome = place.loracle("sample", run, "Name a color.")
    assert outcome.code == 2
    assert f"adapter/{name}: is not what was written" in outcome.line


def test_weights_of_an_older_run_are_those_that_its_result_names(place, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    (run / "manifest.json").unlink()
    flip(run / "adapter" / "adapter_model.safetensors")
    outcome = place.loracle("sample", run, "Name a color.")
    assert outcome.code == 2
    assert "is not what the run recorded (adapter_sha256 in result.json)" in outcome.line


@pytest.fixture
def study(tmp_path):
    """A study's folder of this version: plan, scores and clock under a manifest."""
    folder = write_study(
        tmp_path / "study",
        arms=(SimulatedArm("all-linear"), SimulatedArm("first-third", 0.02, thirds=(0,))),
        seeds=(0,),
        extra_seeds=(),
        repeats=0,
    )
    for name in ("study.yaml", "plan.json"):
        write_records(folder, {name: (folder / name).read_bytes()}, known=STUDY_RECORDS)
    return folder


@pytest.mark.parametrize("name", ["study.yaml", "plan.json", "scores.json"])
@pytest.mark.parametrize("harm", HARMS)
def test_damage_to_a_study_is_named_by_its_report(study, name, harm):
    HARMS[harm](study / name)
    with pytest.raises(RunFolderError, match=rf"study/{name}: is not what was written") as caught:
        read_study(study)
    assert "run the study again" in str(caught.value)


def test_a_study_that_goes_on_makes_damaged_records_anew(study):
    read_study(study)
    before = read_yaml(study / "study.yaml"), read_json(study / "plan.json")
    for name in ("study.yaml", "plan.json", "scores.json"):
        flip(study / name)
    write_records(study, {"clock.json": b"{}"}, known=())
    (study / "clock.json").write_bytes(b"[]")
    said = drop_damaged(study)
    assert set(said) == {"study.yaml", "plan.json", "scores.json", "clock.json"}
    assert said["study.yaml"].startswith("study/study.yaml: is not what was written")
    # Measurements are taken again if they are not there; the others are replaced.
    assert not (study / "clock.json").exists()
    # Who needs scores asks the manifest, computes them again and writes them.
    assert list(faults_of(study, names=["scores.json"])) == ["scores.json"]
    write_plan(study, study=before[0], plan=before[1], scores={"scores": {}})
    assert faults_of(study) == {}
    assert read_study(study).study == before[0]


def test_without_a_sound_manifest_nothing_of_a_study_is_trusted(study):
    (study / "clock.json").write_text('{"step_time_s": {}}')
    (study / "manifest.json").write_text("{}")
    (said,) = drop_damaged(study).values()
    assert said.startswith(f"{study}/manifest.json: is not what was written")
    assert not (study / "manifest.json").exists()
    assert not (study / "clock.json").exists()


@pytest.mark.parametrize(
    "content", ["", "name: x\n", "name: [1\n", dump_yaml({"name": "x", "seeds": 3})]
)
def test_a_broken_study_of_an_older_version_is_one_line(study, content):
    (study / "manifest.json").unlink()
    (study / "study.yaml").write_text(content)
    with pytest.raises(Exception, match=r"study\.yaml|not YAML") as caught:
        read_study(study)
    assert caught.value.exit_code == 2


def test_a_kill_between_manifest_and_file_looks_like_neither_damage_nor_loss(tmp_path, monkeypatch):
    manifest = Manifest(tmp_path)
    manifest.replace({"a": b"one"})

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("loracle.records.manifest.write_durably", killed)
        with pytest.raises(KeyboardInterrupt):
            manifest.replace({"a": b"two", "b": b"new"})
    assert faults_of(tmp_path) == {}
    (tmp_path / "b").write_bytes(b"new")
    assert faults_of(tmp_path) == {}
    (tmp_path / "a").write_bytes(b"twO")
    assert faults_of(tmp_path) == {"a": "is not what was written (see manifest.json)"}


def test_damage_never_becomes_valid_by_writing_on(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.replace({"a": b"one", "b": b"one"})
    (tmp_path / "a").write_bytes(b"0ne")
    (tmp_path / "b").write_bytes(b"0ne")
    manifest.replace({"b": b"two"})
    with pytest.raises(RunFolderError, match="a: is not what was written"):
        manifest.seal(["a", "b"], last={})
    manifest.settle()
    assert list(faults_of(tmp_path)) == ["a"]


def test_every_flip_of_a_manifest_is_seen(tmp_path):
    Manifest(tmp_path).replace({"a": b"one"})
    path = tmp_path / "manifest.json"
    sound = path.read_bytes()
    for index in range(0, len(sound), 7):
        content = bytearray(sound)
        content[index] ^= 1
        path.write_bytes(content)
        try:
            assert read_manifest(tmp_path) == json.loads(sound)["files"]
        except RunFolderError:
            continue
    path.write_bytes(sound)
    require_intact(tmp_path, remedy="")


@pytest.mark.parametrize("harm", ["lost", "doubled", "swapped"])
def test_steps_of_an_older_run_that_are_not_one_after_the_other_are_refused(study, harm):
    run = read_study(study).runs[0]
    path = run.path / "steps.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = {
        "lost": [*lines[:4], *lines[5:]],
        "doubled": [*lines[:4], lines[3], *lines[4:]],
        "swapped": [*lines[:4], lines[5], lines[4], *lines[6:]],
    }
    path.write_text("".join(changed[harm]))
    with pytest.raises(RunFolderError, match=r"steps\.jsonl:5: step \d where step 5 belongs"):
        _ = read_study(study).runs[0].steps
