"""Plans on a machine with a GPU: nothing is forked, and whole commands go through on two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"
STUDY = """\
question: Attention or feed-forward?
base: demo
config:
  train: {max_steps: 3}
  eval: {every_steps: 0, max_examples: 4, generate_examples: 2, max_new_tokens: 4}
  checkpoint: {every_steps: 3}
reference: all-linear
budget: equal-parameters
seeds: [0, 1]
arms: {all-linear: null, attention: null, last-third: null}
"""


def on_card(card, *words, folder, cores="0,1"):
    """The outcome of a command on a card, with two cores; digests of weights are of real bytes."""
    command = [sys.executable, str(RUN), "--quiet", card, *words]
    if cores:
        command = ["taskset", "-c", cores, *command]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PRETEND_COPY_MAX": str(1 << 30)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "three.yaml"
    file.write_text(STUDY, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("card", ["t4", "a100"])
def test_three_arms_are_planned_after_cuda_began(card, study, tmp_path):
    outcome = on_card(card, "loracle", "plan", study, "--fit", "--markdown", folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("| attention |") == 2
    assert "to launch a kernel, measured here" in outcome.stdout


@pytest.mark.parametrize("card", ["t4", "a100"])
def test_a_baseline_fits_itself_and_runs(card, tmp_path):
    words = [
        "train.max_steps=2", "eval.max_examples=4", "eval.generate_examples=2",
        "eval.max_new_tokens=4", "measure.latency_trials=0", "tracking.mode=disabled",
    ]  # fmt: skip
    sets = [part for word in words for part in ("--set", word)]
    outcome = on_card(card, "loracle", "baseline", "demo", "--fit", *sets, folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "fit to" in outcome.stderr


def test_a_study_ends_with_its_accuracy(study, tmp_path):
    words = ["--set", "tracking.mode=disabled", "--set", "measure.latency_trials=0"]
    outcome = on_card("a100", "loracle", "study", study, "--out", "out", *words, folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    (kept,) = (tmp_path / "out").glob("**/predicted.json")
    assert len(json.loads(kept.read_text(encoding="utf-8"))["arms"]) == 3


def test_the_notebook_s_choice_is_made_after_a_backward_pass(study, tmp_path):
    script = tmp_path / "cell.py"
    script.write_text(
        "import torch\n"
        "x = torch.zeros(8, 8, device='cuda', requires_grad=True)\n"
        "(x @ x).sum().backward()\n"
        "from loracle.study.forecast import choose_fit\n"
        f"print(choose_fit({study!r}).words)\n",
        encoding="utf-8",
    )
    outcome = on_card("t4", "python", str(script), folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "no setting has to change" in outcome.stdout
