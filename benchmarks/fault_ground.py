"""Where the fault campaign takes place: a tiny model, what undisturbed runs come to, and lives.

Model, data and the comparison of runs are those of the tests (``tests/`` on the path).
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs_fixture import Place, build_place, facts, open_nursery, settings

_LIMIT_S = 90.0
_SHORT = settings(
    train__max_steps=6,
    eval__every_steps=3,
    eval__generate_examples=2,
    eval__max_new_tokens=4,
    measure__latency_trials=0,
    audit__reload_examples=2,
    checkpoint__every_steps=2,
)
_STUDY = """\
question: What comes of it?
base: tiny.yaml
reference: all-linear
budget: equal-rank
seeds: [0, 1]
config:
  train: {max_steps: 4}
  eval: {every_steps: 4, generate_examples: 2, max_new_tokens: 4}
  measure: {latency_trials: 0, probe_steps: 2, skip_steps: 1}
  audit: {reload_examples: 2}
arms:
  all-linear:
  attention:
"""


@dataclass(frozen=True)
class Ended:
    """How a life ended: exit code, or ``hang``, and what it said."""

    code: str
    out: str
    err: str


@dataclass
class Ground:
    """A place, a process that forks lives, and the bits that every run must come to."""

    place: Place
    nursery: subprocess.Popen[str]
    expected: dict[str, object] = field(default_factory=dict)
    writes: int = 0
    """How often an undisturbed run opens a file of its folder to write."""
    finished: Path = Path()
    """A finished run; trials work on copies."""
    stopped: tuple[Path, ...] = ()
    """Runs that were killed in different phases."""
    study: Path = Path()
    """A finished study."""
    of_study: dict[str, object] = field(default_factory=dict)
    """What its runs come to, by name."""
    cache: Path | None = None
    """Cache of the lives; None: the place's."""

    def live(self, lives: Sequence[dict[str, Any]]) -> list[Ended]:
        """Forks these lives at once and waits for all."""
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps(lives) + "\n")
        self.nursery.stdin.flush()
        codes = json.loads(self.nursery.stdout.readline())
        return [
            Ended(code, _text(Path(life["out"])), _text(Path(life["err"])))
            for code, life in zip(codes, lives, strict=True)
        ]

    def life(self, words: Sequence[object], *, name: str, faults: Sequence[Any] = ()) -> Any:
        """Returns a life of these words, as the nursery takes it."""
        logs = self.place.work / "logs"
        logs.mkdir(exist_ok=True)
        return {
            "argv": [str(word) for word in words],
            "out": str(logs / f"{name}.out"),
            "err": str(logs / f"{name}.err"),
            "faults": list(faults),
            "limit_s": _LIMIT_S,
            "cache": str(self.cache) if self.cache else None,
        }

    def command(self, *words: object) -> Ended:
        """Runs a command without a fault."""
        return self.live([self.life(words, name="command")])[0]

    def words(
        self, run: Path, *, resume: bool = True, changes: Mapping[str, str] | None = None
    ) -> list[object]:
        """Returns the words that start the run, or go on with it if it has begun."""
        sets = [
            word for key, value in (changes or {}).items() for word in ("--set", f"{key}={value}")
        ]
        goes_on = resume and (run / "config.yaml").exists()
        words = ["baseline", self.place.config, *_SHORT, *sets, "--out", run]
        return [*words, *(["--resume"] if goes_on else [])]

    def again(self, run: Path, *, faults: Sequence[Any] = (), **given: Any) -> Ended:
        """Starts the run or goes on with it, under these faults."""
        life = self.life(self.words(run, **given), name=run.name, faults=faults)
        return self.live([life])[0]

    def together(self, run: Path, *, count: int) -> list[Ended]:
        """Starts the run in so many processes at the same moment."""
        words = self.words(run)
        return self.live([self.life(words, name=f"{run.name}-{n}") for n in range(count)])

    @property
    def study_file(self) -> Path:
        """The study's configuration."""
        return self.place.work / "study.yaml"

    def study_facts(self, study: Path) -> dict[str, object]:
        """Returns what the runs of a study come to, by name."""
        return {run.name: facts(run) for run in sorted((study / "runs").iterdir())}

    def facts(self, run: Path) -> dict[str, object]:
        """Returns everything of a finished run that must not depend on its lives."""
        return facts(run)

    @contextmanager
    def own_cache(self, run: Path) -> Iterator[Path]:
        """Gives the lives inside the block a copy of the cache that may be damaged."""
        cache = run.with_name(f"{run.name}-cache")
        shutil.copytree(self.place.home / ".cache" / "loracle", cache)
        self.cache = cache
        try:
            yield cache
        finally:
            self.cache = None
            shutil.rmtree(cache)

    def hostile_data(self, path: Path, texts: Sequence[str]) -> Path:
        """Writes the records with these texts in their fields; returns the file."""
        rows = json.loads(self.place.data.read_text(encoding="utf-8"))
        for index, row in enumerate(rows):
            text = texts[index % len(texts)]
            for key in row:
                row[key] = f"{row[key]} {text}" if row[key] else row[key]
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path


def signal_at(
    at: str, *, nth: int = 1, delay_s: float = 0.0, number: int = signal.SIGKILL
) -> dict[str, Any]:
    """Returns the fault of a signal after the n-th call of ``module:function`` has begun."""
    return {"kind": "signal", "at": at, "nth": nth, "delay_s": delay_s, "number": number}


def open_ground(root: Path) -> Ground:
    """Builds the place under ``root`` and runs what trials compare with and start from."""
    shutil.rmtree(root, ignore_errors=True)
    place = build_place(root)
    ground = Ground(place, open_nursery(place, Path(__file__).with_name("fault_lives.py")))
    ground.study_file.write_text(_STUDY, encoding="utf-8")
    ground.finished = place.work / "finished"
    _must(ground.again(ground.finished))
    ground.expected = facts(ground.finished)
    ground.writes = _count_writes(ground, place.work / "counted")
    ground.stopped = tuple(_stopped(ground, at) for at in ("_train", "answer", "finish_run"))
    ground.study = place.work / "study"
    _must(ground.command("study", ground.study_file, "--out", ground.study))
    ground.of_study = ground.study_facts(ground.study)
    return ground


def _must(ended: Ended) -> None:
    if ended.code != "0":
        raise RuntimeError(f"an undisturbed command ended with {ended.code}: {ended.err[-800:]}")


def _count_writes(ground: Ground, run: Path) -> int:
    """Returns the first refusal that a whole run does not meet, by halving."""
    low, high = 1, 200
    while high - low > 4:
        middle = (low + high) // 2
        shutil.rmtree(run, ignore_errors=True)
        fault = {"kind": "disk", "folder": str(run), "nth": middle, "errno": errno.ENOSPC}
        low, high = (
            (low, middle) if ground.again(run, faults=[fault]).code == "0" else (middle, high)
        )
    return low


def _stopped(ground: Ground, at: str) -> Path:
    """Returns a run that was killed where a function of the bundle begins, or soon after."""
    run = ground.place.work / f"stopped-{at.strip('_')}"
    delay_s = 0.25 if at == "_train" else 0.0
    fault = signal_at(f"loracle.runner.bundle:{at}", delay_s=delay_s)
    ended = ground.again(run, faults=[fault])
    assert ended.code == "-9", ended
    return run


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    text = path.read_bytes().decode("utf-8", "replace")
    return re.sub(r"\n+$", "\n", text)
