"""A run needs nobody: no socket, no key, no answer at a prompt."""

import hashlib
import io
import os
import zipfile

import pytest

from runner.test_tracking import history, session_files
from runs_fixture import facts, load, rows, settings


def test_the_curves_are_in_the_offline_folder_of_the_run(finished):
    (path,) = session_files(finished)
    assert path.parent.name.startswith("offline-run-")
    logged = history(path)
    steps = [row for row in logged if "train/loss_nats_per_token" in row]
    recorded = rows(finished / "steps.jsonl")
    for key in ("loss_nats_per_token", "learning_rate", "grad_norm", "step_time_s"):
        curve = [(row["step"], row[f"train/{key}"]) for row in steps]
        assert curve == [(row["step"], pytest.approx(row[key])) for row in recorded]
    validations = [row for row in logged if "validation/perplexity" in row]
    assert [(row["step"], row["validation/perplexity"]) for row in validations] == [
        (row["step"], pytest.approx(row["perplexity"])) for row in rows(finished / "evals.jsonl")
    ]


@pytest.fixture
def pinned_data(place, tmp_path, monkeypatch):
    """The tiny data as a member of a wheel in an index that is a folder; its source string."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/rows.json", place.data.read_bytes())
        archive.writestr("tiny-1.0.dist-info/METADATA", "Name: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    index = tmp_path / "index"
    index.mkdir()
    (index / "tiny-1.0-py3-none-any.whl").write_bytes(wheel.getvalue())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    return f"pypi:tiny==1.0/tiny/rows.json#sha256={digest}"


def test_with_the_caches_filled_a_whole_run_opens_no_socket_and_asks_nothing(
    place, nursery, finished, pinned_data, tmp_path
):
    """W&B in ``auto``, which finds no key; standard input is at its end from the start."""
    from loracle.sources import resolve_data

    with place.entered():
        resolve_data(pinned_data)
    folder = tmp_path / "run"
    words = settings(data__source=pinned_data, tracking__mode="auto")
    outcome = nursery.live(
        ["baseline", place.config, "--out", folder, *words], folder=folder, offline=True
    )
    assert outcome.code == 0, outcome.err
    assert load(folder / "status.json")["status"] == "completed"
    assert "fetching" not in outcome.err
    assert "W&B" not in outcome.err
    (session,) = session_files(folder)
    assert session.parent.name.startswith("offline-run-")
    assert len([row for row in history(session) if "train/loss_nats_per_token" in row]) == 8
    # Where the data comes from is not what is computed.
    assert facts(folder)["quality"]["base"] == pytest.approx(facts(finished)["quality"]["base"])


def test_the_block_blocks(place, nursery, tmp_path):
    """Or the test above could not fail."""
    folder = tmp_path / "run"
    words = ["baseline", place.config, "--out", folder, *settings(model="hub:nobody/nothing")]
    outcome = nursery.live(words, folder=folder, offline=True)
    assert outcome.code == 2
    assert "no route to the hub" in outcome.err


def test_a_model_with_a_key_is_counted_without_a_network(place, nursery, tmp_path):
    outcome = nursery.live(["placements", "llama-2-7b"], folder=tmp_path / "none", offline=True)
    assert outcome.code == 0
    assert "6,738,415,616 parameters" in outcome.err
    for count in ("39,976,960", "8,388,608", "16,777,216", "23,199,744"):
        assert count in outcome.err
