"""Copies the records of a study that its report needs, to commit them to a repository.

    python experiments/keep_study.py runs/placement_study results/placement_study

Adapters, checkpoints and W&B's files are not copied. ``loracle report results/placement_study``
writes the same report from the copy.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

RECORDS = (
    "config.yaml", "data.json", "environment.json", "evals.jsonl", "examples.jsonl",
    "manifest.json", "modules.json", "result.json", "status.json", "steps.jsonl",
)  # fmt: skip


def keep_study(study: Path, *, out: Path) -> Path:
    """Copies a study's records, plan and scores to ``out``, replacing an earlier copy."""
    names = (
        "study.yaml",
        "plan.json",
        "scores.json",
        "clock.json",
        "predicted.json",
        "manifest.json",
    )
    plan = [study / name for name in names]
    assert plan[0].is_file(), f"{study}: not a study"
    shutil.rmtree(out / "runs", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for file in plan:
        if file.is_file():
            shutil.copy2(file, out / file.name)
    for run in sorted((study / "runs").iterdir()):
        copy = out / "runs" / run.name
        copy.mkdir(parents=True)
        for name in RECORDS:
            if (run / name).is_file():
                shutil.copy2(run / name, copy / name)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    print(f"records in {keep_study(given.study, out=given.out)}")
