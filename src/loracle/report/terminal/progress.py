"""Progress of a running study in the terminal, read from its run folders."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.errors import LoracleError
from loracle.records.names import STATUS, STEPS, run_folder
from loracle.records.result import read_result
from loracle.records.run_state import read_status
from loracle.report.terminal.table import borderless
from loracle.runner.run_spec import RunOutcome
from loracle.study.plan import StudyPlan
from loracle.text import in_words, perplexity_words

# assumed: a person does not look more often, and reading must not take a core from the runs
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
        """Shows this plan from now on; its finished steps do not count for the pace."""
        self.plan = plan
        self._states: dict[str, dict[str, Any]] = {}
        self._read_s = -math.inf
        self._started_s = time.monotonic()
        self._refresh()
        self._steps_before = self._steps_done()

    def view(self) -> RenderableType:
        """Returns the table of arms by seeds, and the remaining time."""
        self._refresh()
        return Group(self._table(), Text(self._words()))

    def words(self) -> str:
        """Returns the number of finished runs and the remaining time."""
        self._read_s = -math.inf
        self._refresh()
        return self._words()

    def _refresh(self) -> None:
        if time.monotonic() - self._read_s >= _READ_EVERY_S:
            self._read_s = time.monotonic()
            for run in self.plan.runs:
                if self._states.get(run.id, {}).get("status") != "completed":
                    self._states[run.id] = run_state(run_folder(self.out, run.id))

    def _words(self) -> str:
        """Returns the progress; time is left at the pace of this process, evaluations included."""
        finished = sum(state.get("status") == "completed" for state in self._states.values())
        words = f"{finished} of {len(self.plan.runs)} runs done"
        done, total = self._steps_done(), len(self.plan.runs) * self.plan.base.train.max_steps
        taken, elapsed = done - self._steps_before, time.monotonic() - self._started_s
        if taken <= 0 or done == total:
            return words
        return f"{words}, about {in_words(elapsed / taken * (total - done))} left"

    def _steps_done(self) -> int:
        return sum(state.get("step") or 0 for state in self._states.values())

    def _table(self) -> Table:
        runs = self.plan.runs
        seeds = list(dict.fromkeys((run.seed, run.role) for run in runs))
        table = borderless(gap=2)
        table.add_column("arm", no_wrap=True)
        for seed, role in seeds:
            table.add_column(f"seed {seed}" + ("" if role == "arm" else f"\n{role}"), no_wrap=True)
        for arm in self.plan.arms:
            table.add_row(
                arm.name,
                *(
                    Text(" ").join(
                        Text(*_state_words(self._states[run.id]))
                        for run in runs
                        if run.arm == arm.name and (run.seed, run.role) == key
                    )
                    for key in seeds
                ),
            )
        return table


def _state_words(state: dict[str, Any]) -> tuple[str, str]:
    """Returns a run's state and its style."""
    status = state.get("status")
    if status == "completed":
        return f"ppl {perplexity_words(state['perplexity'])}", "green"
    if status == "failed":
        return "failed", "bold red"
    if status in ("running", "interrupted") and state.get("step"):
        loss = f" loss {state['loss']:.3f}" if state.get("loss") is not None else ""
        return f"{state['step']}/{state['max_steps']}{loss}", "bold cyan"
    return "-", "dim"


def run_state(folder: Path) -> dict[str, Any]:
    """Returns status, step, last loss and, of a finished run, perplexity; {} if there is no run.

    A file that is being written reads as its previous version.
    """
    if not (folder / STATUS).is_file():
        return {}
    try:
        state = read_status(folder)
        if state.get("status") == "completed":
            return {
                **state,
                "perplexity": read_result(folder, verify=False).quality.tuned.perplexity,
            }
        last = last_step(folder / STEPS)
    except (LoracleError, OSError):
        return {}
    if last is None:
        return dict(state)
    return {**state, "step": last["step"], "loss": last["loss_nats_per_token"]}


# assumed: longer than any row of steps.jsonl
_TAIL_BYTES = 4096


def last_step(path: Path) -> dict[str, Any] | None:
    """Returns the last whole row of ``steps.jsonl``; None if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    row = json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None
    assert row is None or isinstance(row, dict)
    return row


def ended_line(outcome: RunOutcome, *, progress: StudyProgress) -> str:
    """Returns one line about a run that has ended."""
    if outcome.result is None:
        return f"{outcome.out.name}: failed; {progress.words()}"
    perplexity = perplexity_words(outcome.result.quality.tuned.perplexity)
    return f"{outcome.out.name}: perplexity {perplexity}; {progress.words()}"
