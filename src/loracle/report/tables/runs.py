"""Every run of a study: its success criteria with their evidence, and what did not complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from loracle.records.result import Criterion
from loracle.records.study_folder import RunRecord, StudyRecord
from loracle.report.tables.table import Column, Table
from loracle.text import plural

_CRITERIA = ("convergence", "validation", "efficiency", "reproducibility")
_WORDS = {True: "passed", False: "failed", None: "not judged"}
# How the evidence of convergence began until it was judged on the same examples.
_OLD = "Training loss by fifths of "
_ROLES = {"arm": "", "repeat": "repeat", "extra-seed": "extra seed"}
_RUN_COLUMNS = (Column("arm", align="left"), Column("seed"), Column("role", align="left"))


def criteria_table(study: StudyRecord) -> Table:
    """Returns the four criteria of every completed run."""
    return Table(
        name="criteria",
        caption=_summary(study.runs),
        columns=(*_RUN_COLUMNS, *(Column(name, align="left") for name in _CRITERIA)),
        rows=tuple(
            (*_run_cells(run), *(_WORDS[_criterion(run, name).passed] for name in _CRITERIA))
            for run in study.runs
        ),
    )


def _summary(runs: Sequence[RunRecord]) -> str:
    parts = []
    for name in _CRITERIA:
        counts = Counter(_criterion(run, name).passed for run in runs)
        outcomes = [f"{counts[p]} {word}" for p, word in _WORDS.items() if counts[p]]
        parts.append(f"{name}: {', '.join(outcomes)}")
    return (
        f"{plural(len(runs), 'completed run')}. {'; '.join(parts)}. A criterion that nothing "
        f"measured could decide is not judged: reproducibility needs a repeat of the same run."
        f"{_earlier_rule(runs)}"
    )


def _earlier_rule(runs: Sequence[RunRecord]) -> str:
    """Returns a sentence on runs whose convergence was judged by the rule before this one."""
    old = [run for run in runs if run.result.criteria.convergence.evidence.startswith(_OLD)]
    if not old:
        return ""
    return (
        f" Convergence of {plural(len(old), 'run')} was judged when it ended, by an earlier rule:"
        " on the training loss of different batches, whose differences can hide a fall. Today it is"
        " judged on the same held-out examples before and after."
    )


def evidence_table(study: StudyRecord) -> Table:
    """Returns the evidence of every criterion of every run."""
    rows = [
        (
            *_run_cells(run),
            name,
            _WORDS[_criterion(run, name).passed],
            _criterion(run, name).evidence,
        )
        for run in study.runs
        for name in _CRITERIA
    ]
    return Table(
        name="evidence",
        caption="As each run recorded it when it ended.",
        columns=(
            *_RUN_COLUMNS,
            Column("criterion", align="left"),
            Column("outcome", align="left"),
            Column("evidence", align="left", share=0.5),
        ),
        rows=tuple(rows),
    )


def unfinished_table(study: StudyRecord) -> Table | None:
    """Returns the planned runs that did not complete; None if all did."""
    if not study.unfinished:
        return None
    return Table(
        name="unfinished",
        caption="Planned runs that did not complete; they count nowhere in this report.",
        columns=(
            *_RUN_COLUMNS,
            Column("status", align="left"),
            Column("error", align="left", share=0.5),
        ),
        rows=tuple(
            (
                str(run["arm"]),
                str(run["seed"]),
                _ROLES.get(run["role"], str(run["role"])),
                str(run["status"]),
                str(run["error"] or ""),
            )
            for run in study.unfinished
        ),
    )


def _run_cells(run: RunRecord) -> tuple[str, str, str]:
    return run.arm, str(run.seed), _ROLES.get(run.role, run.role)


def _criterion(run: RunRecord, name: str) -> Criterion:
    criterion: Criterion = getattr(run.result.criteria, name)
    return criterion
