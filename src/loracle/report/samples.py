"""The same held-out instructions answered by the reference text, the untuned model and each arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loracle.records.rows import ExampleRow
from loracle.records.study_folder import StudyRecord

_EMPTY = "(empty)"


@dataclass(frozen=True)
class Answered:
    """One answer and its author."""

    name: str
    text: str
    cut: bool
    """It hit the token limit."""


@dataclass(frozen=True)
class Sample:
    """One held-out instruction and its answers."""

    instruction: str
    input: str
    answers: tuple[Answered, ...]
    """The reference answer, the untuned model's, then each arm's."""


def samples_of(study: StudyRecord, *, how_many: int = 4) -> tuple[list[int], list[Sample]]:
    """Returns the seeds whose answers are shown, the lowest of each arm, and the samples.

    Samples are the first ``how_many`` of the validation set that every shown arm answered.
    """
    answered = {arm.name: rows for arm in study.arms if (rows := _answers_by_row(study, arm.name))}
    if not answered:
        return [], []
    first = next(iter(answered.values()))
    common = [row for row in first if all(row in rows for rows in answered.values())]
    seeds = sorted({min(study.runs_of(arm)) for arm in answered})
    return seeds, [
        _sample({arm: rows[row] for arm, rows in answered.items()}) for row in common[:how_many]
    ]


def _answers_by_row(study: StudyRecord, arm: str) -> dict[int, ExampleRow]:
    """Returns the answered examples of an arm's lowest seed by their number."""
    runs = study.runs_of(arm)
    examples = runs[min(runs)].examples if runs else []
    return {row["row"]: row for row in examples if row["generated"] is not None}


def _sample(rows: Mapping[str, ExampleRow]) -> Sample:
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
