"""A study as a person sees it: run with a live table, then judged and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from loracle.report.terminal.progress import StudyProgress, ended_line
from loracle.runner.progress import Progress
from loracle.runner.run_spec import RunOutcome
from loracle.study.clock import keep_clock
from loracle.study.plan import StudyPlan
from loracle.study.run import run_study


def conduct_study(
    plan: StudyPlan, *, out: Path, console: Console, notes: Mapping[str, Any] | None = None
) -> list[RunOutcome]:
    """Runs what is left of a study, prints its verdicts and returns the runs that failed.

    Args:
        plan: The study.
        out: Its folder.
        console: Where the verdicts are printed; progress goes to standard error.
        notes: Recorded with every run.
    """
    table = StudyProgress(plan, out)
    progress = Progress(above=table.view)

    def ended(outcomes: Sequence[RunOutcome]) -> None:
        for outcome in outcomes:
            progress.notice(ended_line(outcome, progress=table))

    outcome = run_study(
        plan, out=out, progress=progress, ended=ended, decided=table.follow, notes=notes
    )
    if not outcome.failed:
        keep_clock(outcome.plan, out=out, progress=progress)
    _predict(out)
    report_study(out, console=console)
    return outcome.failed


def _predict(out: Path) -> None:
    """Leaves in the study's folder what a plan would have said of what was measured."""
    from loracle.records.study_folder import read_study
    from loracle.study.accuracy import compare_with_measured

    compare_with_measured(out, read_study(out))


def report_study(folder: Path, *, console: Console) -> None:
    """Writes a study's report and prints its verdicts.

    Raises:
        RunFolderError: If the folder holds no study, or none of its runs completed.
    """
    from loracle.analysis.verdicts import judge
    from loracle.records.study_folder import read_study
    from loracle.report import write_report
    from loracle.report.terminal.verdicts import verdict_view

    study = read_study(folder)
    console.print(verdict_view(study, judge(study), width=console.width))
    page = write_report(folder)
    console.print(f"Report: {escape(str(page))}", highlight=False, soft_wrap=True)
