"""A study as a person reads it: one page, figures, tables and a paper, all from its records."""

from loracle.report.study.lone_runs import study_of_runs
from loracle.report.study.notebook import charts_of, tables_of
from loracle.report.study.provenance import provenance_of
from loracle.report.study.write import study_markdown, write_report

__all__ = [
    "charts_of",
    "provenance_of",
    "study_markdown",
    "study_of_runs",
    "tables_of",
    "write_report",
]
