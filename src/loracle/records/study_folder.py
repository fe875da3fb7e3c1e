"""The folder of a study: written while it runs, read for statistics and reports.

::

    study.yaml        question, reference arm, budget, seeds, and the resolved base configuration
    plan.json         arms with their ranks and counts, runs with their ids, the trial runs of a
                      learning-rate search, the model's modules
    scores.json       scores of the modules on the frozen base; absent without strategic arms
    clock.json        step times of the arms, taken in turn; absent if they were not
    manifest.json     digests of these files (`loracle.records.manifest`)
    runs/<id>/        one run folder each (`loracle.records.run_folder`)
    report/           page, figures, tables, verdicts

A run counts if it has a ``result.json`` with the status "completed".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from loracle.config.files import dump_yaml, read_yaml
from loracle.errors import RunFolderError, in_one_line
from loracle.placement.inventory import Inventory
from loracle.records.files import (
    disk_faults,
    from_json,
    json_bytes,
    read_json,
    read_jsonl,
)
from loracle.records.manifest import faults_of, forget, require_intact, write_records
from loracle.records.names import (
    CLOCK,
    EVALS,
    EXAMPLES,
    MANIFEST,
    PLAN,
    PREDICTED,
    RESULT,
    SCORES,
    STATUS,
    STUDY,
    STUDY_RECORDS,
    run_folder,
)
from loracle.records.result import RunResult, read_result
from loracle.records.rows import EvalRow, ExampleRow, StepRow, read_steps

_REMEDY = "restore it, or run the study again, which makes it anew"

# Of runs outside a study, and of a single seed, which has no interval.
_COVERAGE = 0.95

Role = Literal["arm", "repeat", "extra-seed", "search"]


@dataclass(frozen=True)
class ArmRecord:
    """A placement under test, resolved for the model."""

    name: str
    placement: str
    """Label of the placement."""
    rank: int | None
    """r of most of its adapters; None: full fine-tuning, without adapters."""
    alpha: float | None
    """Updates are scaled by alpha / rank."""
    trainable_params: int
    budget_gap_frac: float | None
    """(parameters - the reference's) / the reference's; None without a budget to match."""
    modules: tuple[Mapping[str, Any], ...]
    """``modules.json``'s entries: name, rank, alpha, layer, kind, in_features, out_features, ..."""


@dataclass(frozen=True)
class RunRecord:
    """A completed run of a study."""

    id: str
    """Name of the folder."""
    arm: str
    seed: int
    role: Role
    """``arm`` counts in the comparison; the others measure noise or search a learning rate."""
    learning_rate: float
    """Peak learning rate."""
    path: Path
    result: RunResult

    @cached_property
    def steps(self) -> list[StepRow]:
        """Rows of ``steps.jsonl``."""
        return cast("list[StepRow]", read_steps(self.path))

    @cached_property
    def evals(self) -> list[EvalRow]:
        """Rows of ``evals.jsonl``."""
        return cast("list[EvalRow]", read_jsonl(self.path / EVALS))

    @cached_property
    def examples(self) -> list[ExampleRow]:
        """Rows of ``examples.jsonl``, in the order of the validation set."""
        return cast("list[ExampleRow]", read_jsonl(self.path / EXAMPLES))


@dataclass(frozen=True)
class StudyClock:
    """Step times of the arms, taken in turn on the same batches (`loracle.study.clock`)."""

    step_time_s: Mapping[str, tuple[float, ...]]
    """By arm, one per round; none for full fine-tuning."""

    @property
    def num_rounds(self) -> int:
        """Steps per arm."""
        return min(map(len, self.step_time_s.values()))


@dataclass(frozen=True)
class StudyRecord:
    """All records of a study that a report uses."""

    path: Path
    name: str
    study: Mapping[str, Any]
    """``study.yaml``: question, reference, budget, seeds, config (the resolved base), ..."""
    arms: tuple[ArmRecord, ...]
    """In the study's order."""
    runs: tuple[RunRecord, ...]
    """Completed runs, in the plan's order."""
    unfinished: tuple[Mapping[str, Any], ...]
    """Planned runs that did not complete, with their status and error."""
    search: tuple[RunRecord, ...]
    """Completed trial runs of the learning-rate search; empty without one."""
    inventory: Inventory
    """The model's linear layers."""
    scores: Mapping[str, Mapping[str, float]]
    """Score name -> module name -> score; empty without strategic arms."""
    clock: StudyClock | None = None
    """None: only the runs' own clocks."""

    @property
    def reference(self) -> str:
        """Name of the arm that the others are compared with."""
        return str(self.study["reference"])

    @property
    def coverage(self) -> float:
        """Probability that an interval holds the true difference."""
        return float(self.study.get("interval") or _COVERAGE)

    def arm(self, name: str) -> ArmRecord:
        """Returns the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def runs_of(self, arm: str, *, role: Role = "arm") -> dict[int, RunRecord]:
        """Returns the completed runs of an arm by seed."""
        return {run.seed: run for run in self._runs_by.get((arm, role), ())}

    @cached_property
    def _runs_by(self) -> dict[tuple[str, Role], list[RunRecord]]:
        """Completed runs by arm and role: a hundred arms are asked for thousands of times."""
        found: dict[tuple[str, Role], list[RunRecord]] = {}
        for run in self.runs:
            found.setdefault((run.arm, run.role), []).append(run)
        return found

    def repeats_of(self, arm: str) -> tuple[RunRecord, ...]:
        """Returns the completed repeats of an arm: the same seed, run again."""
        return tuple(self._runs_by.get((arm, "repeat"), ()))


def read_study(path: Path) -> StudyRecord:
    """Returns the study in a folder, whose records must be as they were written.

    Raises:
        RunFolderError: If there is none, none of its runs completed, or a record is damaged.
    """
    require_intact(path, remedy=_REMEDY)
    if not (path / PLAN).is_file() or not (path / STUDY).is_file():
        raise RunFolderError(f"{path}: not a study (no {STUDY} and {PLAN})")
    with _as_written(path):
        return _study(path)


def _study(path: Path) -> StudyRecord:
    plan, study = read_json(path / PLAN), read_yaml(path / STUDY)
    missing = [key for key in ("name", "reference", "seeds", "config") if key not in study]
    if missing:
        raise RunFolderError(f"{path / STUDY}: {missing[0]}: missing; {_REMEDY}")
    origin, runs = f"{path / PLAN}", tuple(_completed(path, plan["runs"]))
    if not runs:
        raise RunFolderError(f"{path}: none of the study's runs has completed yet")
    done = {run.id for run in runs}
    return StudyRecord(
        path=path,
        name=study["name"],
        study=study,
        arms=tuple(from_json(ArmRecord, arm, origin=origin) for arm in plan["arms"]),
        runs=runs,
        unfinished=tuple(_unfinished(path, run) for run in plan["runs"] if run["id"] not in done),
        search=tuple(_completed(path, plan.get("search", ()))),
        inventory=from_json(Inventory, plan["inventory"], origin=f"{origin}: inventory"),
        scores=_scores(path),
        clock=_clock(path),
    )


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Turns what a record of another shape raises into one line; a manifest would have told."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunFolderError(f"{path}: a record is damaged ({in_one_line(error)})") from error


def is_study(path: Path) -> bool:
    """Returns whether a folder holds a study, if only a damaged one."""
    return (path / STUDY).is_file() or (path / PLAN).is_file()


def write_plan(
    path: Path,
    *,
    study: Mapping[str, Any],
    plan: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
) -> None:
    """Writes ``study.yaml``, ``plan.json`` and, if there are scores, ``scores.json``.

    Raises:
        RunFolderError: If they cannot be written.
    """
    contents = {STUDY: dump_yaml(study).encode(), PLAN: json_bytes(plan, origin=PLAN)}
    if scores is not None:
        contents[SCORES] = json_bytes(scores, origin=SCORES)
    with disk_faults(path):
        path.mkdir(parents=True, exist_ok=True)
    write_records(path, contents, known=STUDY_RECORDS)


def write_clock(path: Path, clock: Mapping[str, Any]) -> None:
    """Writes ``clock.json``."""
    content = json_bytes(clock, origin=CLOCK, indent=1)
    write_records(path, {CLOCK: content}, known=STUDY_RECORDS)


def drop_damaged(path: Path) -> dict[str, str]:
    """Removes measurements of a study that are damaged, so that they are taken again.

    Returns what is wrong, a line for each damaged record. The others are made anew from what is
    given by whoever runs the study, and replaced.

    Raises:
        RunFolderError: If one cannot be removed.
    """
    try:
        faults = faults_of(path)
    except RunFolderError as error:
        # Then none of them can be verified.
        said = {MANIFEST: str(error)}
        doubtful = {CLOCK, PREDICTED, MANIFEST}
    else:
        said = {name: f"{path.name}/{name}: {fault}; made anew" for name, fault in faults.items()}
        doubtful = faults.keys() & {CLOCK, PREDICTED}
    with disk_faults(path):
        for name in doubtful:
            (path / name).unlink(missing_ok=True)
    forget(path, doubtful)
    return said


def _scores(path: Path) -> dict[str, Mapping[str, float]]:
    """Returns ``scores.json``'s score name -> module name -> score; empty without the file."""
    return dict(read_json(path / SCORES)["scores"]) if (path / SCORES).is_file() else {}


def _clock(path: Path) -> StudyClock | None:
    if not (path / CLOCK).is_file():
        return None
    times = read_json(path / CLOCK)["step_time_s"]
    return StudyClock({arm: tuple(seconds) for arm, seconds in times.items()})


def _completed(path: Path, planned: Iterable[Mapping[str, Any]]) -> Iterable[RunRecord]:
    for run in planned:
        folder = run_folder(path, run["id"])
        if not (folder / RESULT).is_file():
            continue
        result = read_result(folder)
        if result.status == "completed":
            yield RunRecord(path=folder, result=result, **run)


def _unfinished(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    file = run_folder(path, run["id"]) / STATUS
    status = read_json(file) if file.is_file() else {"status": "not started"}
    return {**run, "status": status["status"], "error": status.get("error")}
