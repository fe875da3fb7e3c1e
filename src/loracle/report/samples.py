"""The same held-out instructions answered by the reference text, the untuned model and each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loracle.records.study_folder import StudyRecord

_EMPTY = "(empty)"


@dataclass(frozen=True)
class Answered:
    """One text under a name."""

    name: str
    """Who wrote it."""
    text: str
    """What was written."""
    cut: bool
    """It hit the token limit."""


@dataclass(frozen=True)
class Sample:
    """One held-out instruction and what was answered."""

    instruction: str
    """The instruction."""
    input: str
    """Its input; empty: none."""
    answers: tuple[Answered, ...]
    """The reference answer, the untuned model's, then each arm's."""


def samples_of(study: StudyRecord, *, how_many: int = 4) -> tuple[list[int], list[Sample]]:
    """Returns the seeds whose answers are shown, of each arm its lowest, and the samples.

    They are the first of the validation set that every shown arm answered: nobody chose them.

    Args:
        study: The study.
        how_many: Instructions to show.
    """
    answered = {
        arm.name: rows for arm in study.arms if (rows := _rows_of_lowest_seed(study, arm.name))
    }
    if not answered:
        return [], []
    first = next(iter(answered.values()))
    common = [
        row["row"]
        for row in first
        if all(_find(rows, row["row"]) is not None for rows in answered.values())
    ]
    seeds = sorted({min(study.runs_of(arm)) for arm in answered})
    return seeds, [_sample(answered, row) for row in common[:how_many]]


def _rows_of_lowest_seed(study: StudyRecord, arm: str) -> list[dict[str, Any]]:
    runs = study.runs_of(arm)
    if not runs:
        return []
    return [row for row in runs[min(runs)].examples if row["generated"] is not None]


def _find(rows: Sequence[Mapping[str, Any]], number: int) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["row"] == number), None)


def _sample(answered: Mapping[str, Sequence[Mapping[str, Any]]], number: int) -> Sample:
    found = {arm: _find(rows, number) for arm, rows in answered.items()}
    rows = {arm: row for arm, row in found.items() if row is not None}
    first = next(iter(rows.values()))
    return Sample(
        instruction=first["instruction"],
        input=first["input"] or "",
        answers=(
            Answered("reference answer", first["reference"], cut=False),
            _answered("untuned", first["base_generated"], cut=first["base_hit_limit"]),
            *(_answered(arm, row["generated"], cut=row["hit_limit"]) for arm, row in rows.items()),
        ),
    )


def _answered(name: str, text: str | None, *, cut: bool | None) -> Answered:
    if text is None:
        return Answered(name, "n/a", cut=False)
    return Answered(name, text.strip() or _EMPTY, cut=bool(cut))
