"""Finished runs that repeat another: same signature, beside it."""

from __future__ import annotations

from pathlib import Path

from loracle.criteria import Repeat
from loracle.durable import read_json, read_jsonl
from loracle.runs import completed_runs


def repeats_of(run: Path, *, signature: str) -> list[Repeat]:
    """Returns the finished runs beside ``run`` that have its signature.

    Args:
        run: Its folder.
        signature: Of its result.
    """
    beside = (path for path in completed_runs(run.parent) if path != run)
    found = (_repeat(path, signature=signature) for path in beside)
    return [repeat for repeat in found if repeat is not None]


def _repeat(path: Path, *, signature: str) -> Repeat | None:
    """Returns what a finished run is compared by, or None if it is another run."""
    result = read_json(path / "result.json")
    if result["signature"] != signature:
        return None
    return Repeat(
        name=path.name,
        adapter_sha256=result["adapter_sha256"],
        losses=tuple(row["loss_nats_per_token"] for row in read_jsonl(path / "steps.jsonl")),
        final_loss_nats_per_token=result["quality"]["tuned"]["loss_nats_per_token"],
    )
