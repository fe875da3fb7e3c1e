"""The result of a run, as ``result.json`` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEMORY_KINDS = {
    "tensors": "live tensors, counted",
    "resident_set": "resident set of the process",
    "cuda_allocated": "allocated on the GPU",
}
"""What a memory figure may be of, in words."""


def peak_memory_gib(result: Mapping[str, Any]) -> float | None:
    """Returns what a run's tensors took in training at their most.

    A GPU counts that itself. On a CPU it is counted in the first steps; the resident set also holds
    Python, libraries and what earlier runs of the process left with the allocator, and does not
    compare between runs.
    """
    memory = result["efficiency"]["peak_memory_gib"]
    counted: float | None = memory.get("train_tensors")
    resident: float | None = memory["train"]
    return resident if counted is None else counted


def kind_of_memory(result: Mapping[str, Any]) -> str:
    """Returns what `peak_memory_gib` is of: a key of ``MEMORY_KINDS``."""
    memory = result["efficiency"]["peak_memory_gib"]
    return "tensors" if memory.get("train_tensors") is not None else str(memory["kind"])
