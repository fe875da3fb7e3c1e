"""Rows of the files that hold one JSON object per line, two of which grow while a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

from loracle.errors import RunFolderError
from loracle.records.files import disk_faults, read_jsonl
from loracle.records.names import EVALS, STEPS


class StepRow(TypedDict):
    """``steps.jsonl``: one optimizer step."""

    step: int
    """From 1."""
    epoch: float
    loss_nats_per_token: float
    """Training loss, before the step."""
    learning_rate: float
    grad_norm: float
    """L2 norm before clipping."""
    num_tokens: int
    num_targets: int
    step_time_s: float
    clocked: bool
    """The step counts in the median time."""


class EvalRow(TypedDict):
    """``evals.jsonl``: one validation."""

    step: int
    """Steps taken before it."""
    model: Literal["base", "tuned"]
    loss_nats_per_token: float
    num_targets: int
    num_examples: int
    perplexity: float | None
    """None: beyond the largest number."""
    nll_sum_nats: list[float]
    """By example."""


class ExampleRow(TypedDict):
    """``examples.jsonl``: one validation example, scored, answered or both; else None."""

    row: int
    """In the data source."""
    instruction: str
    input: str
    reference: str
    tokens: int
    """Target tokens, EOS included."""
    nll_sum_nats: float | None
    base_nll_sum_nats: float | None
    """By the untuned model."""
    generated: str | None
    """Greedy answer."""
    base_generated: str | None
    hit_limit: bool | None
    """The answer was cut at the token limit."""
    base_hit_limit: bool | None


def read_steps(run: Path) -> list[dict[str, Any]]:
    """Returns the complete rows of a run's ``steps.jsonl``; none if there is no such file.

    Raises:
        RunFolderError: If a step is missing or there twice.
    """
    rows = read_jsonl(run / STEPS)
    for expected, row in enumerate(rows, 1):
        if row.get("step") != expected:
            raise RunFolderError(
                f"{run / STEPS}:{expected}: step {row.get('step')!r} where step {expected} belongs"
            )
    return rows


def content_of(path: Path) -> bytes:
    """Returns the content of a growing file; empty if there is none yet.

    Raises:
        RunFolderError: If it cannot be read.
    """
    with disk_faults(path):
        return path.read_bytes() if path.exists() else b""


def drop_partial_line(path: Path) -> None:
    """Cuts a last line that was written only in part, as by a killed process.

    Raises:
        RunFolderError: If the file cannot be written.
    """
    if not path.exists():
        return
    with disk_faults(path), path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def contents_up_to(run: Path, *, step: int) -> dict[str, bytes]:
    """Returns the growing files of a run without their rows after ``step``, by name.

    For a checkpoint of an older version, which holds no copies of them.

    Raises:
        RunFolderError: If one cannot be read.
    """
    contents = {}
    for name in (STEPS, EVALS):
        lines = content_of(run / name).splitlines(keepends=True)
        rows = zip(read_jsonl(run / name), lines, strict=True)
        contents[name] = b"".join(line for row, line in rows if row["step"] <= step)
    return contents
