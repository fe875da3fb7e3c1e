"""Tests on pretended cards; ``make test-cuda`` collects them, and ``make test`` does not."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))

from run import command_of, library_folder, on_card, told

if "LORACLE_TEST_CUDA" not in os.environ:  # needs a CUDA build of PyTorch
    collect_ignore_glob = ["*"]
HERE = Path(__file__).resolve().parent
CONFIG = """\
model: "path:{model}"
data: {{source: "path:{data}", max_tokens: 256}}
lora: {{rank: 4, alpha: 8}}
train: {{max_steps: 4, batch_size: 4, learning_rate: 3.0e-3}}
eval: {{every_steps: 4, generate_examples: 2, generate_batch_size: 2, max_new_tokens: 4}}
measure: {{skip_steps: 1, latency_trials: 1, latency_new_tokens: 2}}
checkpoint: {{every_steps: 2}}
tracking: {{mode: disabled}}
"""
STUDY = """\
question: Attention or feed-forward?
base: {config}
reference: all-linear
seeds: [0]
arms: {{all-linear: null, attention: null, feed-forward: null}}
"""


@dataclass(frozen=True)
class Ended:
    """How a command on a card ended."""

    code: int
    out: str
    """Standard output and error."""
    asked: Sequence[dict[str, Any]]
    """What each of its processes asked of the card."""


@dataclass(frozen=True)
class Ground:
    """Inputs of tiny runs, and a home of their own."""

    folder: Path
    model: Path
    config: Path
    study: Path

    def environment(self, card: str, **more: str) -> dict[str, str]:
        home = {"HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        kept = os.environ.get("TRITON_CACHE_DIR", str(self.folder / "triton"))
        caches = {"TRITON_CACHE_DIR": kept}
        return on_card(card, **home, **caches, **more)

    def start(self, card: str, *words: object, **more: str) -> subprocess.Popen[str]:
        """Starts a command in a process group of its own."""
        return subprocess.Popen(
            command_of([str(word) for word in words]),
            env=self.environment(card, **more),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def on(self, card: str, *words: object, **more: str) -> Ended:
        """Runs a command to its end."""
        report = self.folder / f"report-{os.urandom(4).hex()}.jsonl"
        process = self.start(card, *words, PRETEND_REPORT=str(report), **more)
        out, _ = process.communicate(timeout=900)  # of a machine that does other things too
        return Ended(process.returncode, out, told(report))


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> Ground:
    """Where tiny runs on cards take place; the library is built first."""
    from tiny import save_tiny_model, write_records

    library_folder()
    folder = tmp_path_factory.mktemp("cards")
    (folder / "home").mkdir()
    model = save_tiny_model(folder / "model")
    data = write_records(folder / "data.json", count=60, seed=0)
    config, study = folder / "tiny.yaml", folder / "study.yaml"
    config.write_text(CONFIG.format(model=model, data=data), encoding="utf-8")
    study.write_text(STUDY.format(config=config), encoding="utf-8")
    return Ground(folder, model, config, study)


def last_json(out: str) -> dict[str, Any]:
    """Returns the last line that a script printed, as JSON."""
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert lines, out[-3000:]
    return json.loads(lines[-1])
