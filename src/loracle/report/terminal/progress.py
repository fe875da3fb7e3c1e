"""Progress of a running study for the terminal, read from its run folders."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.errors import LoracleError
from loracle.records.files import read_json
from loracle.records.run_folder import read_status
from loracle.runner.outcome import RunOutcome
from loracle.study.plan import PlannedRun, StudyPlan
from loracle.text import in_words

# assumed: often enough for a person, and reading must not slow the runs
_READ_EVERY_S = 2.0


@dataclass
class StudyProgress:
    """Progress of a study, read from the folders of its runs."""

    plan: StudyPlan
    out: Path
    """The study's folder."""

    def __post_init__(self) -> None:
        self.follow(self.plan)

    def follow(self, plan: StudyPlan) -> None:
        """Shows this plan from now on; steps done so far do not count towards the pace."""
        self.plan = plan
        self._cached: dict[str, dict[str, Any]] = {}
        self._read_s = -math.inf
        self._started_at_s = time.monotonic()
        self._steps_before = self._steps_done(self._states())

    def view(self) -> RenderableType:
        """Returns the table of arms by seeds, and a line about the remaining runs."""
        states = self._states()
        return Group(self._table(states), Text(self._words(states)))

    def words(self) -> str:
        """Returns how many runs are done, and the time left."""
        self._read_s = -math.inf
        return self._words(self._states())

    def _states(self) -> dict[str, dict[str, Any]]:
        if time.monotonic() - self._read_s >= _READ_EVERY_S:
            self._read_s = time.monotonic()
            for run in self.plan.runs:
                if self._cached.get(run.id, {}).get("status") != "completed":
                    self._cached[run.id] = run_state(self.out / "runs" / run.id)
        return self._cached

    def _words(self, states: dict[str, dict[str, Any]]) -> str:
        finished = sum(state.get("status") == "completed" for state in states.values())
        words = f"{finished} of {len(self.plan.runs)} runs done"
        left_s = self._left_s(states)
        return f"{words}, about {in_words(left_s)} left" if left_s else words

    def _left_s(self, states: dict[str, dict[str, Any]]) -> float | None:
        """Returns the seconds left at the pace of this process, evaluations included."""
        done = self._steps_done(states)
        taken = done - self._steps_before
        total = len(self.plan.runs) * self.plan.base.train.max_steps
        elapsed = time.monotonic() - self._started_at_s
        return elapsed / taken * (total - done) if taken > 0 else None

    def _steps_done(self, states: dict[str, dict[str, Any]]) -> int:
        return sum(state.get("step") or 0 for state in states.values())

    def _table(self, states: dict[str, dict[str, Any]]) -> Table:
        runs = self.plan.runs
        seeds = list(dict.fromkeys((run.seed, run.role) for run in runs))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("arm", no_wrap=True)
        for seed, role in seeds:
            table.add_column(f"seed {seed}" + ("" if role == "arm" else f"\n{role}"), no_wrap=True)
        for arm in self.plan.arms:
            of_arm = [run for run in runs if run.arm == arm.name]
            table.add_row(arm.name, *(_cell(of_arm, key, states) for key in seeds))
        return table


def _cell(
    runs: Iterable[PlannedRun], key: tuple[int, str], states: dict[str, dict[str, Any]]
) -> Text:
    words = [_state_words(states[run.id]) for run in runs if (run.seed, run.role) == key]
    return Text(" ").join(Text(text, style) for text, style in words)


def _state_words(state: dict[str, Any]) -> tuple[str, str]:
    """Returns a run's state in a few words, and their style."""
    status = state.get("status")
    if status == "completed":
        return f"ppl {state['perplexity']:.3f}", "green"
    if status == "failed":
        return "failed", "bold red"
    if status in ("running", "interrupted") and state.get("step"):
        loss = f" loss {state['loss']:.3f}" if state.get("loss") is not None else ""
        return f"{state['step']}/{state['max_steps']}{loss}", "bold cyan"
    return "-", "dim"


def run_state(folder: Path) -> dict[str, Any]:
    """Returns status, step, last loss and, of a finished run, perplexity; {} if there is no run."""
    if not (folder / "status.json").is_file():
        return {}
    try:
        state = read_status(folder)
        if state.get("status") == "completed":
            quality = read_json(folder / "result.json")["quality"]["tuned"]
            return {**state, "perplexity": quality["perplexity"]}
        last = last_step(folder / "steps.jsonl")
    except (LoracleError, OSError):
        return {}
    if last is None:
        return dict(state)
    return {**state, "step": last["step"], "loss": last["loss_nats_per_token"]}


# assumed: longer than any row of steps.jsonl
_TAIL_BYTES = 4096


def last_step(path: Path) -> dict[str, Any] | None:
    """Returns the last whole row of ``steps.jsonl``; None if there is none."""
    from json import loads

    if not path.is_file():
        return None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    row = loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None
    assert row is None or isinstance(row, dict)
    return row


def ended_line(outcome: RunOutcome, *, progress: StudyProgress) -> str:
    """Returns one line about a run that has ended."""
    if outcome.result is None:
        return f"{outcome.out.name}: failed; {progress.words()}"
    perplexity = outcome.result["quality"]["tuned"]["perplexity"]
    return f"{outcome.out.name}: perplexity {perplexity:.3f}; {progress.words()}"
