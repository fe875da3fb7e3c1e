"""Everything a report says, gathered once: the page, the tables and the paper all draw on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loracle.analysis.orderings import published_orderings
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord
from loracle.report.figures.costs import cost_figures
from loracle.report.figures.curve_charts import loss_figures
from loracle.report.figures.forest import Effect, forest_figure
from loracle.report.figures.maps import (
    maps_caption,
    placement_figures,
    placement_sheet,
    score_figures,
)
from loracle.report.figures.palette import looks_of
from loracle.report.figures.tradeoffs import tradeoff_figures
from loracle.report.figures.vega import Figure
from loracle.report.samples import Sample, samples_of
from loracle.report.tables.orderings import orderings_table
from loracle.report.tables.predicted import predicted_table
from loracle.report.tables.runs import criteria_table, evidence_table, unfinished_table
from loracle.report.tables.search import search_table
from loracle.report.tables.study import (
    arms_by_effect,
    bleu_table,
    cost_table,
    effects_table,
    untuned_table,
    verdict_table,
)
from loracle.report.tables.table import Table
from loracle.report.tables.tradeoffs import tradeoff_table
from loracle.report.text.advice import advice
from loracle.report.text.answer import answer, largest_smallest_effect, noise_words
from loracle.report.text.limits import limits
from loracle.report.text.methods import methods_paragraphs
from loracle.report.text.provenance import (
    Provenance,
    environment_rows,
    provenance_of,
    signature_rows,
)
from loracle.report.text.published import why_it_may_differ


@dataclass(frozen=True)
class Tables:
    """The report's tables."""

    verdicts: Table
    """Every arm beside the reference: what answers the question."""
    effects: Table
    """The same without BLEU and costs, for paper."""
    bleu: Table | None
    """The same of BLEU, for paper; None: no answers."""
    untuned: Table
    """Every arm beside the untuned model."""
    costs: Table
    """What every arm costs."""
    tradeoffs: Table
    """Efficient, dominated or undecided."""
    orderings: Table
    """What others published."""
    criteria: Table
    """The four criteria of every run."""
    evidence: Table
    """Their evidence."""
    unfinished: Table | None
    """Runs that did not complete; None: all did."""
    search: Table | None
    """Learning rates that were tried; None: none were."""
    predicted: Table | None
    """What a plan says beside what was measured; None: nothing was predicted."""

    def __iter__(self) -> Iterator[Table]:
        """Yields those that there are."""
        yield from (table for table in vars(self).values() if table is not None)


@dataclass(frozen=True)
class Figures:
    """The report's figures."""

    forest: Figure
    """Loss differences with their intervals."""
    losses: tuple[Figure, ...]
    """Loss curves."""
    tradeoffs: tuple[Figure, ...]
    """Loss against each cost."""
    costs: tuple[Figure, ...]
    """Memory and time."""
    maps: tuple[Figure, ...]
    """Where each arm's adapters sit."""
    map_sheet: Figure
    """The same on one sheet."""
    scores: tuple[Figure, ...]
    """What the scores saw."""

    def on_page(self) -> list[Figure]:
        """Returns those that a page shows, in its order."""
        losses, rest = self.losses, (*self.tradeoffs, *self.maps, *self.scores, *self.costs)
        return [self.forest, *losses, *rest]

    def on_paper(self) -> list[Figure]:
        """Returns those that have a file of their own."""
        return [
            *(self.forest, *self.losses, *self.tradeoffs, *self.costs),
            *(self.map_sheet, *self.scores),
        ]


@dataclass(frozen=True)
class Contents:
    """All of a report but its looks."""

    study: StudyRecord
    """What was run."""
    verdicts: Verdicts
    """What it established."""
    provenance: Provenance
    """Where the numbers come from."""
    answer: tuple[str, ...]
    """What was found, in words."""
    advice: tuple[str, ...]
    """What to take, in words."""
    noise: tuple[str, ...]
    """The noise that was measured, in words."""
    methods: tuple[str, ...]
    """How it was made: model and data, training, arms, measures, statistics."""
    limits: tuple[str, ...]
    """What it cannot show."""
    orderings_note: str
    """Why a published ordering may come out otherwise."""
    maps_caption: str
    """How the maps are to be read."""
    environment: tuple[tuple[str, str], ...]
    """What it was measured on."""
    signatures: tuple[tuple[str, str], ...]
    """What each arm's results are results of."""
    sample_seeds: tuple[int, ...]
    """Seeds of the shown answers."""
    samples: tuple[Sample, ...]
    """Answers side by side."""
    tables: Tables
    """Tables."""
    figures: Figures
    """Figures."""


def contents_of(study: StudyRecord, verdicts: Verdicts) -> Contents:
    """Returns the contents of a study's report."""
    provenance = provenance_of(study)
    orderings = published_orderings(study, verdicts)
    seeds, samples = samples_of(study)
    smallest = largest_smallest_effect(verdicts)
    line = provenance.line
    judged = verdict_table(study, verdicts, provenance=line)
    return Contents(
        study=study,
        verdicts=verdicts,
        provenance=provenance,
        answer=tuple(answer(study, verdicts)),
        advice=tuple(advice(study, verdicts)),
        noise=tuple(noise_words(verdicts)),
        methods=tuple(methods_paragraphs(study, provenance)),
        limits=tuple(limits(study, provenance, smallest_effect_nats=smallest)),
        orderings_note=why_it_may_differ(orderings, study, provenance),
        maps_caption=maps_caption(study),
        environment=tuple(environment_rows(study)),
        signatures=tuple(signature_rows(study)),
        sample_seeds=tuple(seeds),
        samples=tuple(samples),
        tables=Tables(
            verdicts=judged,
            effects=effects_table(judged, verdicts=verdicts, provenance=line),
            bleu=bleu_table(study, verdicts, provenance=line) if verdicts.num_answers else None,
            untuned=untuned_table(study, verdicts, provenance=line),
            costs=cost_table(study, provenance=line),
            tradeoffs=tradeoff_table(study, verdicts, provenance=line),
            orderings=orderings_table(orderings),
            criteria=criteria_table(study),
            evidence=evidence_table(study),
            unfinished=unfinished_table(study),
            search=search_table(study),
            predicted=predicted_table(study),
        ),
        figures=figures_of(study, verdicts),
    )


def figures_of(study: StudyRecord, verdicts: Verdicts) -> Figures:
    """Returns the figures of a study's report."""
    looks = looks_of([arm.name for arm in study.arms], reference=study.reference)
    return Figures(
        forest=forest_figure(
            _effects(study, verdicts),
            reference=study.reference,
            noise_floor=verdicts.noise["loss_nats_per_token"].floor,
        ),
        losses=tuple(loss_figures(study, looks=looks)),
        tradeoffs=tuple(tradeoff_figures(study, verdicts)),
        costs=tuple(cost_figures(study)),
        maps=tuple(placement_figures(study)),
        map_sheet=placement_sheet(study),
        scores=tuple(score_figures(study)),
    )


def _effects(study: StudyRecord, verdicts: Verdicts) -> list[Effect]:
    found = (verdicts.comparison(arm.name) for arm in arms_by_effect(study, verdicts))
    effects = []
    for comparison in found:
        if comparison is not None and comparison.difference is not None:
            low, high = comparison.interval or (None, None)
            effects.append(
                Effect(comparison.arm, comparison.difference, low, high, comparison.verdict)
            )
    return effects
