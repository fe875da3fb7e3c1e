"""What goes on has the base and data that it began with, wherever it goes on from."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from loracle.errors import Interrupted
from loracle.model.identity import BaseIdentity
from loracle.runner.same_inputs import base_record, compare_base
from runs_fixture import Place, build_place, copied, digest, load, settings
from tiny import save_tiny_model, tiny_tokenizer

SHORT = {
    "train__max_steps": 2,
    "eval__every_steps": 0,
    "eval__generate_examples": 0,
    "measure__latency_trials": 0,
    "audit__reload_examples": 1,
}
IDENTITY = BaseIdentity("w", "c", "g", "t", "float32", None)
VERSIONS = {"transformers": "5", "tokenizers": "1", "torch": "2"}


def environment(identity=IDENTITY, *, revision="sha256:1", device="cpu", **versions) -> dict:
    record = base_record(identity, revision=revision, device=device)
    return {"base": record, "versions": VERSIONS | versions}


@pytest.mark.parametrize(
    ("now", "changed", "unverified"),
    [
        (environment(), (), ""),
        (environment(device="cuda"), (), ""),
        (environment(revision="sha256:2"), (), ""),
        (environment(transformers="6"), (), ""),
        (environment(replace(IDENTITY, weights_sha256="x")), ("weights",), ""),
        (environment(replace(IDENTITY, config_sha256="x")), ("config.json",), ""),
        (
            environment(replace(IDENTITY, generation_config_sha256="x")),
            ("generation_config.json",),
            "",
        ),
        (
            environment(replace(IDENTITY, tokenizer_sha256="x", weights_sha256="x")),
            ("weights", "tokenizer"),
            "",
        ),
        # The same file, converted otherwise: another base.
        (environment(replace(IDENTITY, tokenizer_sha256="x")), ("tokenizer",), ""),
        # The same files, described otherwise by other libraries.
        (
            environment(replace(IDENTITY, config_sha256="x"), transformers="6"),
            (),
            "other versions read its config.json",
        ),
        (
            environment(replace(IDENTITY, config_sha256="x"), revision="2", transformers="6"),
            ("config.json",),
            "",
        ),
        # In another dtype the same weights have other bits.
        (environment(replace(IDENTITY, weights_sha256="x", dtype="bfloat16")), (), ""),
        (
            environment(replace(IDENTITY, weights_sha256="x", dtype="bfloat16"), revision="2"),
            (),
            "its weights were float32 and are bfloat16 here",
        ),
    ],
)
def test_a_base_is_the_same_if_all_that_decides_its_numbers_is(now, changed, unverified):
    check = compare_base(environment(), now)
    assert (check.changed, check.unverified) == (changed, unverified)


def test_packed_weights_of_two_kinds_of_device_are_not_compared():
    packed = replace(IDENTITY, quantization="nf4")
    before = environment(packed)
    elsewhere = environment(replace(packed, weights_sha256="x"), device="cuda")
    assert compare_base(before, elsewhere).changed == ()
    assert compare_base(before, environment(replace(packed, weights_sha256="x"))).changed


def test_a_record_without_digests_is_not_verified():
    assert compare_base({"versions": VERSIONS}, environment()).unverified == (
        "its record has no digests of its base"
    )


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Place, Path]:
    """A place of its own, whose model tests may change, and a run in it that was interrupted."""
    place = build_place(tmp_path_factory.mktemp("begun"))
    folder = place.work / "runs" / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loracle.runner.bundle.finish_run", stopped)
        assert place.baseline("--out", folder, **SHORT).code == 130
    return place, folder


def stopped(*_, **__):
    raise Interrupted("stopped by SIGINT")


@pytest.fixture
def model(begun):
    """The model's folder, as it was again after the test."""
    place, _ = begun
    kept = shutil.copytree(place.model, place.model.with_name("kept"))
    yield place.model
    shutil.rmtree(place.model, ignore_errors=True)
    kept.rename(place.model)


def replaced(model: Path) -> None:
    save_tiny_model(model, seed=1)


def edited(model: Path, *, file: str, **changes: object) -> None:
    tree = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(tree | changes))


def retrained_tokenizer(model: Path) -> None:
    tokenizer = tiny_tokenizer().train_new_from_iterator(["other words"] * 9, vocab_size=300)
    tokenizer.save_pretrained(model)


def found_in(run: Path) -> dict[Path, object]:
    """What is in a run's folder; of the status, what it says."""
    read = {True: load, False: digest}
    files = [path for path in run.rglob("*") if path.is_file()]
    return {path: read[path.name == "status.json"](path) for path in files}


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (replaced, "weights"),
    "layers": (partial(save_tiny_model, layers=2), "weights, config.json"),
    "norm": (partial(edited, file="config.json", rms_norm_eps=0.5), "config.json"),
    "rope": (
        partial(
            edited, file="config.json", rope_parameters={"rope_theta": 9.0, "rope_type": "default"}
        ),
        "config.json",
    ),
    "ends": (
        partial(edited, file="generation_config.json", eos_token_id=[1, 2]),
        "generation_config.json",
    ),
    "tokenizer": (retrained_tokenizer, "tokenizer"),
    "chat template": (
        lambda model: (model / "chat_template.jinja").write_text("{{ messages }}"),
        "tokenizer",
    ),
}


@pytest.mark.parametrize(("change", "part"), CHANGES.values(), ids=CHANGES)
def test_a_run_does_not_go_on_with_another_base(begun, model, tmp_path, change, part):
    place, first = begun
    run = copied(first, tmp_path / "run")
    untouched = found_in(run)
    change(model)
    outcome = place.baseline("--out", run, "--resume", **SHORT)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        f"RunFolderError: run: the base model changed since the run began ({part}); "
        "restore it or start a new run"
    )
    assert found_in(run) == untouched


def test_a_run_that_was_killed_is_interrupted_when_it_is_refused(begun, model, tmp_path):
    place, first = begun
    run = copied(first, tmp_path / "run")
    status = load(run / "status.json") | {"status": "running", "phase": "train"}
    (run / "status.json").write_text(json.dumps(status))
    (run / "manifest.json").unlink(missing_ok=True)
    replaced(model)
    assert place.baseline("--out", run, "--resume", **SHORT).code == 2
    assert load(run / "status.json") == status | {"status": "interrupted"}


def test_a_source_that_is_gone_leaves_the_status_as_it_was(begun, model, tmp_path):
    place, first = begun
    run = copied(first, tmp_path / "run")
    before = found_in(run)
    shutil.rmtree(model)
    outcome = place.baseline("--out", run, "--resume", **SHORT)
    assert (outcome.code, outcome.line.partition(":")[0]) == (2, "SourceError")
    assert found_in(run) == before


def test_held_out_texts_beyond_the_tokens_count_too(begun, tmp_path):
    """BLEU is measured on them."""
    place, first = begun
    run = copied(first, tmp_path / "run")
    recorded = load(run / "environment.json") | {"held_out_sha256": "0" * 64}
    (run / "environment.json").write_text(json.dumps(recorded))
    (run / "manifest.json").unlink()
    outcome = place.baseline("--out", run, "--resume", **SHORT)
    assert outcome.code == 2
    assert "run: the held-out texts changed since the run began" in outcome.line


def test_from_another_folder_the_same_paths_are_the_same_run(begun, model, tmp_path, monkeypatch):
    """Nor does a card beside the model, or a time of a file, make another base."""
    place, first = begun
    (model / "README.md").write_text("a card")
    (model / "config.json").touch()
    elsewhere = replace(place, work=tmp_path / "deeper" / "there")
    elsewhere.work.mkdir(parents=True)
    outcome = elsewhere.baseline("--out", first, "--resume", **SHORT)
    assert outcome.code == 0, outcome.err
    assert "cannot be verified" not in outcome.err
    answers = elsewhere.loracle("sample", first, "Name a river.", "--max-new-tokens", 2)
    assert (answers.code, answers.err) == (0, "")


def test_a_sample_is_of_the_runs_own_base(begun, model, tmp_path):
    """After the test before it the run is finished."""
    place, run = begun
    replaced(model)
    outcome = place.loracle("sample", run, "Name a river.", "--max-new-tokens", 2)
    assert outcome.code == 2
    assert outcome.line.startswith("RunFolderError: first: the base model changed since the run")


def test_what_an_older_record_does_not_say_is_said_and_not_refused(begun, tmp_path):
    place, first = begun
    run = copied(first, tmp_path / "old")
    recorded = load(run / "environment.json")
    for key in ("base", "held_out_sha256", "paths_from"):
        del recorded[key]
    (run / "environment.json").write_text(json.dumps(recorded))
    (run / "manifest.json").unlink()
    outcome = place.loracle("sample", run, "Name a river.", "--max-new-tokens", 2)
    assert outcome.code == 0
    assert outcome.line == (
        "old: that the base is the same cannot be verified: its record has no digests of its base"
    )


def test_runs_done_before_keep_others_from_another_base(begun, model):
    """As a study that goes on: what is finished and what is not must be comparable."""
    from loracle.config.files import load_config
    from loracle.errors import RunFolderError
    from loracle.runner.run_many import run_many
    from loracle.runner.run_spec import RunSpec

    place, first = begun
    assert place.baseline("--out", first, "--resume", **SHORT).code == 0
    replaced(model)
    with place.entered():
        words = [word for word in settings(**SHORT) if word != "--set"]
        config = load_config(place.config, overrides=words)
        other = RunSpec(config.model_copy(update={"seed": 1}), place.work / "runs" / "second")
        for specs in ([RunSpec(config, first), other], [replace(other, beside=[first])]):
            with pytest.raises(RunFolderError, match=r"^first: the base model changed .*weights"):
                run_many(specs)
            assert not other.out.exists()
    assert load(first / "status.json")["status"] == "completed"


def test_the_record_names_no_folder(begun):
    place, first = begun
    recorded = load(first / "environment.json")
    assert recorded["paths_from"] == "../.."
    assert set(asdict(IDENTITY)) < set(recorded["base"])
    assert str(place.model.parent) not in json.dumps(recorded)
