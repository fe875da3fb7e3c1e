"""The shipped notebook: nothing stored in it, and it runs on the recorded run and on a study."""

from pathlib import Path

import pytest

from analysis.stats.simulated import ARMS, write_study
from loracle.report import study_of_runs

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "baseline_analysis.ipynb"


@pytest.fixture
def notebook():
    import nbformat

    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def run_notebook(notebook, *, folder, timeout):
    """The notebook after its cells were executed, in order, by a kernel of their own."""
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def run(notebook):
    return run_notebook(notebook, folder=NOTEBOOK.parent, timeout=120)


def outputs(notebook):
    """Returns the MIME types and texts of everything that was displayed."""
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert not [out for out in shown if out.output_type == "stream"], "nothing was warned of"
    return outputs_of(notebook)


def outputs_of(notebook):
    """The MIME types and texts of everything that was displayed, not what was printed."""
    shown = [
        out
        for cell in notebook.cells
        for out in cell.get("outputs", ())
        if out.output_type in ("display_data", "execute_result")
    ]
    types = [key for out in shown for key in out.data]
    texts = "\n".join(str(out.data.get("text/markdown", "")) for out in shown)
    return types, texts


def test_nothing_is_stored_in_it(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_every_piece_of_code_is_introduced_by_a_sentence(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2)
    assert all(cell.source.rstrip().endswith(".") for cell in notebook.cells[::2])


def test_it_runs_on_the_recorded_run(notebook, monkeypatch):
    monkeypatch.delenv("LORACLE_STUDY", raising=False)
    types, texts = outputs(run(notebook))
    assert "200 validation examples" in texts
    assert "| perplexity | 6.160 | 4.962 | -19.4 % (no interval) |" in texts
    assert types.count("image/svg+xml") >= 5


def test_it_runs_on_a_study(notebook, monkeypatch, tmp_path):
    monkeypatch.setenv("LORACLE_STUDY", str(write_study(tmp_path, arms=ARMS[:3])))
    types, texts = outputs(run(notebook))
    assert "not distinguishable" in texts or "worse" in texts
    assert types.count("image/svg+xml") >= 8


def test_seeds_of_one_run_are_read_as_a_study_of_one_arm():
    study = study_of_runs(ROOT / "results" / "demo")
    assert [arm.name for arm in study.arms] == ["all-linear"]
    assert [run.seed for run in study.runs] == [0, 1]
    assert study.inventory.num_layers == 30
    assert study.arms[0].trainable_params == 4_884_480
