"""The Colab notebook on a pretended T4, cell by cell in one process as in a kernel."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "colab_baseline.ipynb"
RUN = """
import json, sys, types
shown = types.ModuleType("IPython.display")
shown.Markdown = str
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": shown}
space = {"__name__": "__main__", "display": print}
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
for cell in cells:
    source = "".join(cell["source"])
    if cell["cell_type"] == "code" and sys.argv[2] not in source:
        exec(compile(source, cell["id"], "exec"), space)
    if sys.argv[2] in source:
        break
"""
SETTINGS = (
    "tracking.mode=disabled eval.every_steps=0 measure.latency_trials=0 train.batch_size=2 "
    "data.max_tokens=128 checkpoint.every_steps=1 eval.generate_examples=2 eval.max_new_tokens=4 "
    "audit.reload_examples=2"
)


def run_cells(ground, *, until):
    """Runs the cells before the first that has ``until`` in it; returns the folder of its runs."""
    runs = ground.folder / f"notebook-{until or 'all'}"
    given = {
        "LORACLE_RUNS": str(runs),
        "LORACLE_MODEL": f"path:{ground.model}",
        "LORACLE_DATA": f"path:{ground.folder / 'data.json'}",
        "LORACLE_STEPS": "2",
        "LORACLE_STUDY_STEPS": "2",
        "LORACLE_SETTINGS": SETTINGS,
    }
    ended = ground.on("t4", "python", "-c", RUN, NOTEBOOK, until or "no such cell", **given)
    assert ended.code == 0, ended.out[-3000:]
    return runs


def test_the_baseline_of_the_notebook_ends_on_a_t4(ground):
    runs = run_cells(ground, until="study = {")
    (result,) = runs.glob("baseline-*/result.json")
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["status"] == "completed"
    assert "float16" in found["signature"]


def test_the_notebook_ends_with_its_study_on_a_t4(ground):
    runs = run_cells(ground, until="")
    assert len(list(runs.glob("small-study-*/runs/*/result.json"))) == 9
