"""Losses and answers of a study's runs by example, as arrays.

Shape legend: E scored validation examples, A answered ones, 10 counts per answer
(`loracle.analysis.stats.bleu`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loracle.analysis.comparison import UNTUNED, Comparison
from loracle.analysis.stats.bleu import Counts, answer_counts, paired_bleu_of_counts
from loracle.analysis.stats.paired import paired_difference
from loracle.errors import RunFolderError
from loracle.records.names import EXAMPLES, RESULT
from loracle.records.rows import ExampleRow
from loracle.records.study_folder import RunRecord, StudyRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Losses and answers of every completed run that counts, on the same examples."""

    tokens: Floats
    """Target tokens of each example: (E,)."""
    base_nll_nats: Floats
    """NLL of each example under the untuned model, summed over its tokens: (E,)."""
    nll_nats: Mapping[str, Mapping[int, Floats]]
    """Arm -> seed -> the same after training: (E,)."""
    base_counts: Counts | None
    """Counts of the untuned model's answers: (A, 10); None: it did not answer."""
    counts: Mapping[str, Mapping[int, Counts]]
    """Arm -> seed -> the same after training; empty without answers."""
    coverage: float
    """Of the intervals."""

    @property
    def num_answers(self) -> int:
        """Examples that were answered."""
        return max(
            (len(c) for by_seed in self.counts.values() for c in by_seed.values()), default=0
        )


def read_outcomes(study: StudyRecord) -> Outcomes:
    """Returns the outcomes of the study's completed runs.

    Raises:
        RunFolderError: If two runs did not score, or not answer, the same examples.
    """
    runs = [run for arm in study.arms for run in study.runs_of(arm.name).values()]
    _require_same_examples(runs)
    first = _scored(runs[0]) if runs else []
    answered = _answered(runs[0]) if runs else []
    has_base = bool(answered) and all(row["base_generated"] is not None for row in answered)
    return Outcomes(
        tokens=_column(first, "tokens"),
        base_nll_nats=_column(first, "base_nll_sum_nats"),
        nll_nats={
            arm.name: {
                seed: _column(_scored(run), "nll_sum_nats")
                for seed, run in study.runs_of(arm.name).items()
            }
            for arm in study.arms
        },
        base_counts=_counts(runs[0], "base_generated") if has_base else None,
        counts={
            arm.name: {
                seed: _counts(run, "generated")
                for seed, run in study.runs_of(arm.name).items()
                if _answered(run)
            }
            for arm in study.arms
        },
        coverage=study.coverage,
    )


def compare_losses(
    outcomes: Outcomes, arm: str, reference: str, *, noise_floor: float | None
) -> Comparison:
    """Returns two arms' difference in loss, or an arm's from the untuned model; not yet judged."""
    a, b = _paired(outcomes.nll_nats, arm, reference=reference, untuned=outcomes.base_nll_nats)
    coverage = outcomes.coverage
    difference = paired_difference(a, b, outcomes.tokens, coverage=coverage) if a else None
    return Comparison(arm, reference, "loss_nats_per_token", difference, noise_floor)


def compare_bleu(
    outcomes: Outcomes, arm: str, reference: str, *, noise_floor: float | None
) -> Comparison:
    """Returns two arms' difference in BLEU, or an arm's from the untuned model; not yet judged."""
    a, b = _paired(outcomes.counts, arm, reference=reference, untuned=outcomes.base_counts)
    coverage = outcomes.coverage
    difference = paired_bleu_of_counts(np.stack(a), np.stack(b), coverage=coverage) if a else None
    return Comparison(arm, reference, "bleu", difference, noise_floor)


def _paired(
    by_arm: Mapping[str, Mapping[int, Any]], arm: str, *, reference: str, untuned: Any
) -> tuple[list[Any], list[Any]]:
    """Returns the arrays of both arms for their common seeds; the untuned model's, once."""
    a = by_arm[arm]
    if reference == UNTUNED:
        seeds = sorted(a) if untuned is not None else []
        return [a[seed] for seed in seeds], [untuned] if seeds else []
    b = by_arm[reference]
    seeds = sorted(a.keys() & b.keys())
    return [a[seed] for seed in seeds], [b[seed] for seed in seeds]


def _require_same_examples(runs: Sequence[RunRecord]) -> None:
    for rows, done in ((_scored, "scored"), (_answered, "answered")):
        examples = [[(row["row"], row["tokens"]) for row in rows(run)] for run in runs]
        for run, found in zip(runs, examples, strict=True):
            if found != examples[0]:
                raise RunFolderError(
                    f"{run.path / EXAMPLES}: {done} other examples than "
                    f"{runs[0].id}; only runs on the same examples can be compared"
                )
        one, other = (r.result.quality.tuned.tokenizer for r in (runs[0], run))
        if one != other and _answered(run):
            raise RunFolderError(
                f"{run.path / RESULT}: BLEU with the tokenizer {other}, {runs[0].id} with {one}; "
                "only BLEU of one tokenizer can be compared"
            )


def _scored(run: RunRecord) -> list[ExampleRow]:
    return [row for row in run.examples if row["nll_sum_nats"] is not None]


def _answered(run: RunRecord) -> list[ExampleRow]:
    return [row for row in run.examples if row["generated"] is not None]


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return np.asarray([row[key] for row in rows], dtype=np.float64)


def _counts(run: RunRecord, key: Literal["generated", "base_generated"]) -> Counts:
    """Returns the counts of a run's answers, with the tokenizer that its own BLEU has."""
    rows = _answered(run)
    return answer_counts(
        [row[key] or "" for row in rows],
        [row["reference"] for row in rows],
        tokenizer=run.result.quality.tuned.tokenizer,
    )
