"""Whole tiny runs: where they take place, the command in this process, and lives to be killed.

The place has a home with a telling name, a folder in it to work in, and its inputs elsewhere, so
that every test of a run can see whether the machine shows in what the run leaves behind.
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

USER = "wilhelmina"
CLOCKS = ("step_time_s", "clocked")
_CHECKOUT = {"commit": "0" * 40, "dirty": False}
CONFIG = """\
model: "path:{model}"
dtype: float32
device: cpu
data: {{source: "path:{data}", max_tokens: 256}}
train: {{max_steps: 8, batch_size: 4, learning_rate: 3.0e-3}}
eval: {{every_steps: 4, generate_examples: 4, generate_batch_size: 3, max_new_tokens: 8}}
measure: {{skip_steps: 2, latency_trials: 1, latency_new_tokens: 4}}
checkpoint: {{every_steps: 3}}
tracking: {{mode: disabled}}
"""


def set_aside() -> None:
    """Leaves what is alive out of every later collection of garbage.

    A run collects at each change of phase, and would scan all objects of PyTorch, Transformers and
    the tests before it. It also asks whether there are such objects, and counting a million of them
    takes longer than a tiny run's step.
    """
    gc.collect()
    gc.freeze()
    gc.get_freeze_count = lambda: 1  # type: ignore[assignment]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What it said on standard error, which must be one line."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


@dataclass(frozen=True)
class Place:
    """A home, a folder to work in, and the inputs of a tiny run."""

    home: Path
    work: Path
    model: Path
    data: Path
    config: Path

    @property
    def environment(self) -> dict[str, str]:
        """Another user's, who has no key and no mirror."""
        private = ("WANDB_", "HF_TOKEN", "HUGGING_FACE", "LORACLE_", "NETRC")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(private)}
        return kept | {"HOME": str(self.home), "USER": USER, "LOGNAME": USER}

    def loracle(self, *argv: object) -> Outcome:
        """Runs ``loracle`` with these words, here, in this process."""
        from loracle.cli.main import app, run

        set_aside()
        with self.entered(), _captured() as (out, err):
            code = run(partial(app, args=[str(word) for word in argv]))
        return Outcome(code, out.getvalue(), err.getvalue())

    def baseline(self, *argv: object, **changes: object) -> Outcome:
        """Runs ``loracle baseline`` on the tiny config with these ``--set a__b=value``."""
        return self.loracle("baseline", self.config, *argv, *settings(**changes))

    def forget(self) -> None:
        """Loses what is known of the untuned model from earlier runs."""
        shutil.rmtree(self.home / ".cache" / "loracle" / "known", ignore_errors=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Is this user in this folder for a while."""
        with pytest.MonkeyPatch.context() as patch:
            for key in os.environ.keys() - self.environment.keys():
                patch.delenv(key)
            for key, value in self.environment.items():
                patch.setenv(key, value)
            patch.chdir(self.work)
            # Whoever edits the checkout while the tests run does not make a repeat another run.
            patch.setattr("loracle.engine.environment._checkout", lambda _root: _CHECKOUT)
            yield


def settings(**changes: object) -> list[str]:
    """``train__max_steps=3`` as ``["--set", "train.max_steps=3"]``."""
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return [word for pair in pairs for word in ("--set", pair)]


@contextlib.contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


def build_place(root: Path) -> Place:
    """Makes a place under ``root``; its model and data lie outside the home."""
    from tiny import save_tiny_model, write_records

    home = root / "homes" / USER
    work = home / "work"
    work.mkdir(parents=True)
    inputs = root / "inputs"
    inputs.mkdir()
    model = save_tiny_model(inputs / "model")
    data = write_records(inputs / "data.json", count=60, seed=0)
    config = work / "tiny.yaml"
    config.write_text(CONFIG.format(model=model, data=data), encoding="utf-8")
    return Place(home=home, work=work, model=model, data=data, config=config)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    """Where tiny runs take place; tests write below a folder of their own."""
    return build_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def finished(place) -> Path:
    """The folder of a finished run with W&B offline; nobody writes in it."""
    folder = place.work / "finished" / "first"
    outcome = place.baseline("--out", folder, tracking__mode="offline")
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """Studies without steps in turn and predictions, which take longer than tiny runs do."""
    for name in ("keep_clock", "compare_with_measured"):
        monkeypatch.setattr(f"loracle.cli.study.{name}", lambda *_, **__: None)


@pytest.fixture
def only_runs(monkeypatch, unmeasured) -> None:
    """Studies without a report too."""
    monkeypatch.setattr("loracle.cli.study.report_study", lambda *_, **__: None)


def rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(path: Path) -> dict:
    """The object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def facts(run: Path) -> dict[str, object]:
    """Everything of a finished run that must not depend on its lives: all but the clocks."""
    steps = [
        {key: value for key, value in row.items() if key not in CLOCKS}
        for row in rows(run / "steps.jsonl")
    ]
    return {
        "status": load(run / "status.json")["status"],
        "adapter": digest(run / "adapter" / "adapter_model.safetensors"),
        "steps": steps,
        "evals": rows(run / "evals.jsonl"),
        "examples": rows(run / "examples.jsonl"),
        "quality": load(run / "result.json")["quality"],
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, tuple[int, str | None]]:
    """Modification time and hash of everything below a folder; equal if nothing was touched."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            digest(path) if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


def copied(run: Path, to: Path) -> Path:
    """A copy of a run folder that may be damaged."""
    return Path(shutil.copytree(run, to))


def open_nursery(place: Place, script: Path) -> subprocess.Popen[str]:
    """Starts a process that reads lives and forks them; it finds the modules that this one does."""
    environment = place.environment | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=place.work,
        env=environment,
    )


class Nursery:
    """The process that forks lives; see ``lives``."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._process = open_nursery(place, Path(__file__).with_name("lives.py"))

    def live(self, argv: Sequence[object], *, folder: Path, **end: float | str) -> Outcome:
        """Runs one command to its end, or to the end that is asked for."""
        log = folder.parent / f"{folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        life = {
            "argv": [str(word) for word in argv],
            "folder": str(folder),
            "log": str(log),
            "end": end,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(life) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Outcome(code, "", log.read_text(encoding="utf-8"))

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def nursery(place) -> Iterator[Nursery]:
    """Runs commands that can be killed."""
    opened = Nursery(place)
    yield opened
    opened.close()
