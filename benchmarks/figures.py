"""Medians, intervals, small tables, logged blocks, and result files."""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import loracle
from loracle.engine.device import dtype_name
from loracle.engine.environment import capture_environment
from loracle.text import GIB, slug_of

T = TypeVar("T")
Row = dict[str, Any]

_RESAMPLES = 2000
_COVERAGE = 0.95


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Returns median, p25 and p75."""
    if len(values) == 1:
        return {"median": values[0], "p25": values[0], "p75": values[0]}
    p25, median, p75 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "p25": p25, "p75": p75}


def bootstrap(items: Sequence[T], statistic: Callable[[Sequence[T]], float]) -> list[float]:
    """Returns the 95 % percentile interval of a statistic over resampled items."""
    draw = random.Random(0)
    values = sorted(statistic(draw.choices(items, k=len(items))) for _ in range(_RESAMPLES))
    tail = round((1 - _COVERAGE) / 2 * _RESAMPLES)
    return [values[tail], values[-1 - tail]]


def counted(rows: Iterable[Row]) -> list[Row]:
    """Returns the steps without the warm-ups."""
    return [row for row in rows if not row["warm_up"]]


def seconds_per_token(rows: Sequence[Row]) -> float:
    """Returns the seconds of the steps over their real tokens."""
    return sum(row["step_time_s"] for row in rows) / sum(row["num_tokens"] for row in rows)


def step_figures(rows: Sequence[Row]) -> Row:
    """Returns the median seconds per step and the rates over all steps.

    ``gflop_per_s`` is None for rows that count no products.
    """
    seconds = [row["step_time_s"] for row in rows]
    return {
        "step_time_s": statistics.median(seconds),
        "tokens_per_s": 1 / seconds_per_token(rows),
        "gflop_per_s": sum(row.get("gflop", 0.0) for row in rows) / sum(seconds) or None,
    }


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def block_of(rows: Sequence[Row], *, device: Any, dtype: Any, **more: Any) -> Row:
    """Returns the result of a block as it is logged; ``more`` adds or replaces keys."""
    return {
        "error": None,
        "rows": list(rows),
        "peak_gib": peak_gib(device),
        "sources": sources_digest(),
        "environment": environment_of(device, dtype),
        **more,
    }


def environment_of(device: Any, dtype: Any) -> dict[str, Any]:
    """Returns the environment of a benchmark, with TRL's version."""
    from importlib.metadata import PackageNotFoundError, version

    environment = capture_environment(device=str(device), dtype=dtype_name(dtype))
    try:
        trl = version("trl")
    except PackageNotFoundError:
        trl = None
    environment["versions"] = {**environment["versions"], "trl": trl}
    return environment


def sources_digest() -> str:
    """Returns 12 hex digits over the package and the benchmarks; a table's figures share it."""
    digest = sha256()
    for root in (Path(loracle.__file__).parent, Path(__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def dated(name: str, device: str, *, folder: str = "results/benchmarks") -> Path:
    """Returns ``<folder>/<name>-<date>-<device>.json``."""
    return Path(folder) / f"{name}-{datetime.now(UTC):%Y%m%d}-{slug_of(device)}.json"


def publish(name: str, report: Row, *, text: str, folder: str = "results/benchmarks") -> None:
    """Writes a report to its dated file, and prints its text."""
    path = dated(name, report["environment"]["device"]["name"], folder=folder)
    write_report(path, report)
    print(f"{text}\n\nwritten to {path}")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file without an unfinished last line; none without a file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def peak_gib(device: Any) -> float:
    """Returns this process's peak memory: allocated on a GPU, resident set (VmHWM) on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert match
    return int(match[1]) * 1024 / GIB
