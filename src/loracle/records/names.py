"""Names of the files in the folders of runs and studies; nothing else spells them."""

from __future__ import annotations

from pathlib import Path

# A run's folder.
CONFIG, STATUS, LOCK = "config.yaml", "status.json", ".lock"
ENVIRONMENT, DATA, MODULES = "environment.json", "data.json", "modules.json"
STEPS, EVALS, EXAMPLES = "steps.jsonl", "evals.jsonl", "examples.jsonl"
RESULT = "result.json"
MANIFEST, TRACEBACK = "manifest.json", "traceback.txt"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""In the folder ``adapter``, as PEFT names it."""
ADAPTER_CARD = "README.md"
"""In the folder ``adapter``: the model card, as the hub names it."""

# Kept between evaluation and result, for a run that is interrupted there.
ANSWERS, MEMORY = "answers.json", "memory.json"

RUN_RECORDS = (CONFIG, ENVIRONMENT, DATA, MODULES, STEPS, EVALS, EXAMPLES, RESULT)
"""What a finished run's manifest lists, beside its status and its adapter's files."""

# A study's folder.
STUDY, PLAN, SCORES, CLOCK = "study.yaml", "plan.json", "scores.json", "clock.json"
PREDICTED = "predicted.json"
STUDY_RECORDS = (STUDY, PLAN, SCORES, CLOCK, PREDICTED)
"""What a study's manifest lists."""
REPORT, PAGE, VERDICTS = "report", "index.html", "verdicts.json"


def run_folder(study: Path, run_id: str) -> Path:
    """Returns the folder of a study's run."""
    return study / "runs" / run_id
