"""The Colab notebook: nothing stored in it, and it runs from its first cell to its last."""

import functools
import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_notebook import outputs_of, run_notebook

from runs_fixture import load
from tiny import save_tiny_model

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "colab_baseline.ipynb"
SHORT = (
    "tracking.mode=disabled eval.every_steps=0 measure.latency_trials=0 train.batch_size=4 "
    "checkpoint.every_steps=1 eval.generate_examples=2 eval.max_new_tokens=4 "
    "audit.reload_examples=2"
)


@pytest.fixture
def notebook():
    import nbformat

    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def executed(notebook, place, monkeypatch, folder, **environment):
    for key, value in {**place.environment, **environment}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("LORACLE_RUNS", str(folder))
    return outputs_of(run_notebook(notebook, folder=NOTEBOOK.parent, timeout=900))


def test_nothing_is_stored_in_it(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_every_cell_says_what_it_does_in_a_sentence(notebook):
    told = [cell.source.rstrip() for cell in notebook.cells if cell.cell_type == "markdown"]
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown", *["markdown", "code"] * (len(kinds) // 2)]
    assert all(text.endswith(".") for text in told)
    assert all(text.count(". ") == 0 for text in told)


owners = functools.cache(importlib.metadata.packages_distributions)


@pytest.fixture
def install(notebook, monkeypatch, tmp_path):
    """Runs the cell that installs, in an empty folder, where LoRAcle and pip are not what they are.

    It returns pip's calls and their constraints. pip fails as often as ``fails`` says and then puts
    the versions of ``replaced`` in place.
    """
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    folder = tmp_path / "content"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LORACLE_SOURCE", raising=False)

    monkeypatch.setattr(importlib.metadata, "packages_distributions", owners)

    def run(*, fails=0, replaced=None, spec=None):
        calls, here = [], importlib.metadata.version

        def pip(command, **_):
            kept = Path(command[-1]).read_text() if "--constraint" in command else None
            calls.append((command[command.index("--quiet") + 1], kept))
            if len(calls) > fails and replaced:
                new = lambda name: replaced.get(name) or here(name)  # noqa: E731
                space["version"] = new
            return SimpleNamespace(returncode=int(len(calls) <= fails))

        monkeypatch.setattr(subprocess, "run", pip)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        space = {}
        exec(compile(cell, "cell", "exec"), space)  # what the kernel does
        return calls

    return run


def clone_into(folder: Path) -> str:
    (folder / "src" / "loracle").mkdir(parents=True)
    return str(folder)


@pytest.mark.parametrize("place", ["loracle", "../loracle", ".", ".."])
def test_a_clone_around_or_beside_the_notebook_is_installed(install, place):
    clone = clone_into(Path.cwd() / place)
    ((source, kept),) = install()
    assert Path(source).resolve() == Path(clone).resolve()
    assert f"numpy=={importlib.metadata.version('numpy')}\n" in kept


def test_a_source_that_is_named_goes_first(install, monkeypatch):
    clone_into(Path.cwd() / "loracle")
    monkeypatch.setenv("LORACLE_SOURCE", "elsewhere")
    assert install()[0][0] == "elsewhere"


def test_a_folder_of_that_name_is_not_taken_for_the_package(install):
    clone_into(Path.cwd() / "loracle")
    assert len(install(spec=SimpleNamespace(origin=None))) == 1
    assert install(spec=SimpleNamespace(origin="here/__init__.py")) == []


def test_without_a_clone_it_says_where_to_put_one(install):
    with pytest.raises(
        SystemExit, match=r"beside this notebook .* LORACLE_SOURCE .* run this cell"
    ):
        install()


def test_where_a_loaded_package_must_be_replaced_it_asks_for_a_restart(install):
    clone_into(Path.cwd() / "loracle")
    with pytest.raises(SystemExit, match=r"\(numpy [\d.]+\).*Restart session, then run all cells"):
        install(fails=1, replaced={"numpy": "99.0"})


def test_pip_may_need_a_second_try_and_replace_nothing(install):
    clone_into(Path.cwd() / "loracle")
    (_, kept), (_, free) = install(fails=1)
    assert kept
    assert free is None


def test_it_trains_compares_and_goes_on(notebook, place, monkeypatch, tmp_path):
    settings = (
        f"{SHORT} data.max_tokens=128 dtype=float32 lora.dropout=0 train.batch_size=2 "
        "eval.generate_batch_size=1"
    )
    given = {
        "LORACLE_MODEL": f"path:{save_tiny_model(tmp_path / 'inputs' / 'model', layers=1)}",
        "LORACLE_DATA": f"path:{place.data}",
        "LORACLE_STEPS": 3,
        "LORACLE_STUDY_STEPS": 2,
        "LORACLE_SETTINGS": settings,
    }
    types, texts = executed(notebook, place, monkeypatch, tmp_path, **given)
    assert "**Peak memory, GiB**" in texts
    assert "| perplexity |" in texts
    assert "attention" in texts
    assert types.count("image/svg+xml") >= 2
    first = load(tmp_path / "baseline-model-3" / "result.json")
    assert first["status"] == "completed"
    # As after a disconnect: what is done is read, and nothing is trained again.
    tables = next(n for n, cell in enumerate(notebook.cells) if "tables_of(run)" in cell.source)
    notebook.cells = notebook.cells[: tables + 1]
    _, again = executed(notebook, place, monkeypatch, tmp_path, **given)
    assert "| perplexity |" in again
    assert load(tmp_path / "baseline-model-3" / "result.json") == first


@pytest.mark.real
def test_it_runs_on_the_demo_s_model_and_data(notebook, place, monkeypatch, tmp_path):
    given = {
        "LORACLE_MODEL": "smollm2-135m",
        "LORACLE_DATA": "alpaca-demo",
        "LORACLE_STEPS": 2,
        "LORACLE_STUDY_STEPS": 2,
        "LORACLE_SETTINGS": f"{SHORT} data.max_records=40",
        "LORACLE_CACHE": os.environ.get("LORACLE_CACHE") or tmp_path / "cache",
    }
    _, texts = executed(notebook, place, monkeypatch, tmp_path, **given)
    assert "134,515,008" in texts or "4,884,480" in texts
