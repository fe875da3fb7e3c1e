"""The contents of a report, which page, tables and paper draw on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loracle.analysis.orderings import published_orderings
from loracle.analysis.tradeoffs import Fronts, fronts_of
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord
from loracle.report.figures.costs import cost_figures
from loracle.report.figures.curve_charts import loss_figures
from loracle.report.figures.forest import forest_figure
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
from loracle.report.text.answer import (
    answer,
    at_one_rate,
    largest_smallest_effect,
    noise_words,
)
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
    """Every arm beside the reference."""
    effects: Table
    """The verdicts without BLEU and costs, for the paper."""
    bleu: Table | None
    """BLEU differences, for the paper; None: no answers."""
    untuned: Table
    """Every arm beside the untuned model."""
    costs: Table
    tradeoffs: Table
    """Efficient, dominated or undecided, by cost."""
    orderings: Table
    """Published orderings and their outcome here."""
    criteria: Table
    """The four criteria of every run."""
    evidence: Table
    """Evidence of the criteria."""
    unfinished: Table | None
    """Runs that did not complete; None: all did."""
    search: Table | None
    """Learning rates tried; None: no search."""
    predicted: Table | None
    """Predictions beside measurements; None: nothing was predicted."""

    def __iter__(self) -> Iterator[Table]:
        """Yields the tables that exist."""
        yield from (table for table in vars(self).values() if table is not None)


@dataclass(frozen=True)
class Figures:
    """The report's figures."""

    forest: Figure
    """Loss differences with their intervals."""
    losses: tuple[Figure, ...]
    tradeoffs: tuple[Figure, ...]
    """Loss against each cost."""
    costs: tuple[Figure, ...]
    """Memory and time."""
    maps: tuple[Figure, ...]
    """Positions of each arm's adapters."""
    map_sheet: Figure
    """All maps on one sheet."""
    scores: tuple[Figure, ...]
    """Heat maps of the module scores."""

    def on_page(self) -> list[Figure]:
        """Returns the page's figures, in its order."""
        rest = (*self.tradeoffs, *self.maps, *self.scores, *self.costs)
        return [self.forest, *self.losses, *rest]

    def on_paper(self) -> list[Figure]:
        """Returns the figures with a file of their own."""
        return [
            *(self.forest, *self.losses, *self.tradeoffs, *self.costs),
            *(self.map_sheet, *self.scores),
        ]


@dataclass(frozen=True)
class Contents:
    """A report without its layout; texts are lists of sentences or paragraphs."""

    study: StudyRecord
    verdicts: Verdicts
    provenance: Provenance
    answer: tuple[str, ...]
    advice: tuple[str, ...]
    noise: tuple[str, ...]
    """The noise floor."""
    methods: tuple[str, ...]
    """Model and data, training, arms, measures, statistics."""
    limits: tuple[str, ...]
    """What the study cannot show."""
    orderings_note: str
    """Why a published ordering may come out otherwise."""
    maps_caption: str
    """How to read the maps."""
    environment: tuple[tuple[str, str], ...]
    """What it was measured on."""
    signatures: tuple[tuple[str, str], ...]
    """Signatures of each arm's runs."""
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
    fronts = fronts_of(study, verdicts)
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
            effects=effects_table(judged, study, verdicts, provenance=line),
            bleu=bleu_table(study, verdicts, provenance=line) if verdicts.num_answers else None,
            untuned=untuned_table(study, verdicts, provenance=line),
            costs=cost_table(study, provenance=line),
            tradeoffs=tradeoff_table(study, fronts, provenance=line),
            orderings=orderings_table(orderings),
            criteria=criteria_table(study),
            evidence=evidence_table(study),
            unfinished=unfinished_table(study),
            search=search_table(study),
            predicted=predicted_table(study),
        ),
        figures=figures_of(study, verdicts, fronts),
    )


def figures_of(study: StudyRecord, verdicts: Verdicts, fronts: Fronts) -> Figures:
    """Returns the figures of a study's report."""
    looks = looks_of([arm.name for arm in study.arms], reference=study.reference)
    comparisons = [verdicts.comparison(arm.name) for arm in arms_by_effect(study, verdicts)]
    return Figures(
        forest=forest_figure(
            [c for c in comparisons if c and c.difference is not None],
            reference=study.reference,
            noise_floor=verdicts.noise["loss_nats_per_token"].floor,
            coverage=verdicts.coverage,
            note=at_one_rate(study),
        ),
        losses=tuple(loss_figures(study, looks=looks)),
        tradeoffs=tuple(tradeoff_figures(study, verdicts, fronts)),
        costs=tuple(cost_figures(study)),
        maps=tuple(placement_figures(study)),
        map_sheet=placement_sheet(study),
        scores=tuple(score_figures(study)),
    )
