"""Runs a study with a live table, then prints its verdicts and writes its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loracle.engine.small_machine import can_start_threads
from loracle.errors import RunFailed
from loracle.records.study_folder import read_study
from loracle.report.terminal.progress import StudyProgress, ended_line
from loracle.runner.progress import Progress
from loracle.runner.run_spec import RunOutcome
from loracle.study.accuracy import compare_with_measured
from loracle.study.clock import keep_clock
from loracle.study.plan import StudyPlan
from loracle.study.run import run_study

# measured: the chart renderer starts about 20, some by the number of cores
_DRAWING_THREADS = 32


def conduct_study(
    plan: StudyPlan, *, out: Path, console: Console, notes: Mapping[str, Any] | None = None
) -> list[RunOutcome]:
    """Runs the unfinished runs of a study, prints its verdicts and returns the failed runs.

    Verdicts go to ``console``, progress to standard error; ``notes`` are recorded with every run.
    """
    table = StudyProgress(plan, out)
    progress = Progress(above=table.view)

    def ended(outcomes: Sequence[RunOutcome]) -> None:
        for outcome in outcomes:
            progress.notice(ended_line(outcome, progress=table))

    outcome = run_study(
        plan, out=out, progress=progress, ended=ended, decided=table.follow, notes=notes
    )
    if len(outcome.failed) == len(outcome.outcomes):
        raise RunFailed(f"{out}: every run failed, the first with: {outcome.failed[0].error}")
    if not outcome.failed:
        keep_clock(outcome.plan, out=out, progress=progress)
    compare_with_measured(out, read_study(out))
    report_study(out, console=console)
    return outcome.failed


def report_study(folder: Path, *, console: Console) -> None:
    """Writes a study's report and prints its verdicts.

    Raises:
        RunFolderError: If the folder holds no study, or none of its runs completed.
        RunFailed: If this machine does not let the figures be drawn.
    """
    from loracle.analysis.verdicts import judge
    from loracle.report import write_report
    from loracle.report.terminal.verdicts import verdict_view

    study = read_study(folder)
    console.print(verdict_view(study, judge(study), width=console.width))
    if not can_start_threads(_DRAWING_THREADS):
        # It would abort the process.
        raise RunFailed(
            f"{folder}: its runs are done; drawing the report needs more threads than are allowed "
            f"here (ulimit -u): run `loracle report` on it where there are some"
        )
    page = write_report(folder)
    console.print(f"Report: {page}", soft_wrap=True)
