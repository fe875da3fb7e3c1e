"""A campaign of faults: kills, signals, damage, full disks, limits, lost streams, hostile texts.

    make faults                                    runs what is missing, then writes the table
    python benchmarks/faults.py --only "kill in train" --trials 3

Reproducible by its seed: trial n of a cell draws from ``seed:cell:n``; only the moments at which
signals arrive depend on the machine. It can be stopped and goes on where it was. Needs ``tests/``
on the path. Rows go to ``--work``; the table goes to ``results/faults/``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fault_cells import CELLS, Cell, summary
from fault_ground import Ground, open_ground
from fault_outcomes import OUTCOMES
from figures import table

ROOT = Path(__file__).parents[1]


def run_trial(ground: Ground, cell: Cell, *, index: int, seed: int) -> dict[str, Any]:
    """Returns the row of one trial."""
    draw = random.Random(f"{seed}:{cell.name}:{index}")
    slug = "".join(char if char.isalnum() else "-" for char in cell.name)
    run = ground.place.work / "trials" / f"{slug}-{index}"
    run.parent.mkdir(exist_ok=True)
    started_at = time.monotonic()
    outcome = cell.trial(ground, draw, run)
    if outcome.kind in ("survived", "refused"):
        shutil.rmtree(run, ignore_errors=True)
    return {
        "cell": cell.name,
        "trial": index,
        "outcome": outcome.kind,
        "what": outcome.what,
        "seconds": round(time.monotonic() - started_at, 2),
    }


def markdown(rows: list[dict[str, Any]], *, seed: int) -> str:
    """Returns the table as Markdown, with what it was made of."""
    found = summary(rows)
    counts = {key: sum(row[key] for row in found) for key in ("trials", *OUTCOMES)}
    total = {"cell": "all", **counts}
    header = ("cell", "trials", *OUTCOMES)
    lines = table(header, [[str(row[key]) for key in header] for row in [*found, total]])
    return (
        f"Faults, and what came of them. Seed {seed}; {datetime.now(UTC):%Y-%m-%d}; "
        f"{platform.system()}, one core of {os.cpu_count()}; `make faults`.\n\n"
        "Survived: after a restart the same bits as an undisturbed run. Refused: one line names "
        "what is wrong, and nothing is lost. Lost: a traceback, a hang, or no way back. Silent: "
        f"other figures without a word.\n\n{lines}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "faults")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "faults")
    parser.add_argument("--only", action="append", help="cells; by default all")
    parser.add_argument("--trials", type=int, help="of each cell at most; by default all")
    given = parser.parse_args()
    log = given.work / f"trials-{given.seed}.jsonl"
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["cell"], row["trial"]) for row in rows}
    wanted = [
        (cell, index)
        for cell in CELLS
        for index in range(min(cell.trials, given.trials or cell.trials))
        if (cell.name, index) not in done and (not given.only or cell.name in given.only)
    ]
    if wanted:
        ground = open_ground(given.work.absolute() / "place")
        for cell, index in wanted:
            row = run_trial(ground, cell, index=index, seed=given.seed)
            rows.append(row)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if row["outcome"] in ("lost", "silent"):
                print(f"{row['outcome']}: {cell.name} {index}: {row['what']}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, seed=given.seed)
    (given.out / "faults.md").write_text(text, encoding="utf-8")
    found = {"seed": given.seed, "cells": summary(rows), "trials": rows}
    (given.out / "faults.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(text)
    sys.exit(any(row["outcome"] in ("lost", "silent") for row in rows))


if __name__ == "__main__":
    main()
