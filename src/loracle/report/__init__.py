"""A study as a person reads it: one page, figures, tables and a paper, all from its records.

Imports analysis, records, placement and config; only ``terminal`` also shows live runs and plans.
"""

from loracle.records.lone_runs import study_of_runs
from loracle.report.notebook import charts_of, tables_of
from loracle.report.text.provenance import provenance_of
from loracle.report.write import study_markdown, write_report

__all__ = [
    "charts_of",
    "provenance_of",
    "study_markdown",
    "study_of_runs",
    "tables_of",
    "write_report",
]
