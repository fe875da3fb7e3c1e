"""The report's tables and figures one by one, for a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loracle.analysis.tradeoffs import fronts_of
from loracle.analysis.verdicts import judge
from loracle.records.study_folder import StudyRecord
from loracle.report.contents import figures_of
from loracle.report.figures.examples import example_figure
from loracle.report.figures.vega import as_altair
from loracle.report.tables.baseline import baseline_table
from loracle.report.tables.runs import criteria_table
from loracle.report.tables.study import cost_table, untuned_table, verdict_table
from loracle.report.tables.table import markdown_of
from loracle.report.tables.tradeoffs import tradeoff_table
from loracle.report.text.provenance import provenance_of

if TYPE_CHECKING:
    import altair


def tables_of(study: StudyRecord) -> list[str]:
    """Returns the tables as Markdown; of a lone arm, its runs beside the untuned model."""
    line = provenance_of(study).line
    if len(study.arms) == 1:
        return [baseline_table(study), markdown_of(criteria_table(study))]
    verdicts = judge(study)
    tables = (
        verdict_table(study, verdicts, provenance=line),
        untuned_table(study, verdicts, provenance=line),
        cost_table(study, provenance=line),
        tradeoff_table(study, fronts_of(study, verdicts), provenance=line),
        criteria_table(study),
    )
    return [markdown_of(table) for table in tables]


def charts_of(study: StudyRecord) -> dict[str, altair.TopLevelMixin]:
    """Returns the figures that have something to show, by name."""
    verdicts = judge(study)
    fronts = fronts_of(study, verdicts)
    figures = [*figures_of(study, verdicts, fronts).on_paper(), example_figure(study)]
    return {figure.name: as_altair(figure) for figure in figures if figure.spec is not None}
