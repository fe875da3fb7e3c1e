"""Copies what a report is made from out of a study, so that it can be kept in a repository.

    python experiments/keep_study.py runs/placement_study results/placement_study

Adapters, checkpoints and W&B's files stay where they are; everything that a number rests on comes
along, and ``loracle report results/placement_study`` writes the report again from the copy.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

RECORDS = (
    "config.yaml", "data.json", "environment.json", "evals.jsonl", "examples.jsonl",
    "modules.json", "result.json", "status.json", "steps.jsonl",
)  # fmt: skip


def keep_study(study: Path, *, out: Path) -> Path:
    """Returns ``out`` with the records of a study, its plan and its scores.

    Args:
        study: A study's folder.
        out: Where to; what an earlier copy left there is replaced.
    """
    names = ("study.yaml", "plan.json", "scores.json", "clock.json", "predicted.json")
    plan = [study / name for name in names]
    assert plan[0].is_file(), f"{study}: not a study"
    shutil.rmtree(out / "runs", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for file in plan:
        if file.is_file():
            shutil.copy2(file, out / file.name)
    for run in sorted((study / "runs").iterdir()):
        kept = out / "runs" / run.name
        kept.mkdir(parents=True)
        for name in RECORDS:
            if (run / name).is_file():
                shutil.copy2(run / name, kept / name)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    print(f"kept in {keep_study(given.study, out=given.out)}")
