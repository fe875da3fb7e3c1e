"""The cells of the fault campaign: what is done to a run or study, and how often."""

from __future__ import annotations

import errno
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fault_damage import (
    damaged_adapter,
    damaged_cache,
    damaged_finished,
    damaged_study,
    damaged_unfinished,
    hostile_text,
    in_the_way,
)
from fault_outcomes import OUTCOMES, Trial
from fault_stops import (
    PHASES,
    disk,
    ended_in,
    limited,
    report_killed,
    stream_lost,
    study_killed,
    two_at_once,
    without_threads,
)


@dataclass(frozen=True)
class Cell:
    """One kind of fault."""

    name: str
    trials: int
    trial: Trial


def _signals() -> list[Cell]:
    return [
        Cell(f"{signal.Signals(number).name} in {phase}", 8, ended_in(phase, number=number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for phase in ("train", "finish")
    ]


CELLS: tuple[Cell, ...] = (
    *(
        Cell(f"kill in {phase}", 20, ended_in(phase, number=signal.SIGKILL))
        for phase in PHASES
    ),
    Cell("kill in a study", 8, study_killed),
    Cell("kill in a report", 8, report_killed),
    *_signals(),
    Cell("disk full", 24, disk(errno.ENOSPC)),
    Cell("disk read-only", 16, disk(errno.EROFS)),
    Cell("disk error", 8, disk(errno.EIO)),
    Cell("file size limited", 12, limited("RLIMIT_FSIZE", 0, 60_000)),
    Cell("memory limited", 20, limited("RLIMIT_AS", 1 << 20, 200 << 20)),
    Cell("open files limited", 12, limited("RLIMIT_NOFILE", 0, 12)),
    Cell("no threads", 4, without_threads),
    Cell("stream closed, full or left", 20, stream_lost),
    Cell("two processes on one folder", 12, two_at_once),
    Cell("damaged record of a finished run", 100, damaged_finished),
    Cell("damaged adapter", 16, damaged_adapter),
    Cell("damaged record of a study", 60, damaged_study),
    Cell("damaged record of a stopped run", 60, damaged_unfinished("")),
    Cell("damaged checkpoint", 40, damaged_unfinished("checkpoints")),
    Cell("damaged cache", 12, damaged_cache),
    Cell("something in the way", 20, in_the_way),
    Cell("hostile text in the data", 16, hostile_text),
)  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each cell in order, how many of its trials came out in which way."""
    return [
        {
            "cell": cell.name,
            "trials": len(of),
            **{kind: sum(row["outcome"] == kind for row in of) for kind in OUTCOMES},
        }
        for cell in CELLS
        if (of := [row for row in rows if row["cell"] == cell.name])
    ]
