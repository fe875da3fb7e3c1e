"""Medians, intervals, small tables, and the files that results are written to."""

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
from loracle.text import GIB

T = TypeVar("T")

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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; the first column is text, the others figures."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def environment_of(device: Any, dtype: Any) -> dict[str, Any]:
    """Returns the environment of a benchmark, with TRL's version."""
    from importlib.metadata import PackageNotFoundError, version

    found = capture_environment(device=str(device), dtype=dtype_name(dtype))
    try:
        trl = version("trl")
    except PackageNotFoundError:
        trl = None
    found["versions"] = {**found["versions"], "trl": trl}
    return found


def sources_digest() -> str:
    """Returns 12 hex digits over the engine and the benchmarks; figures of one table share it."""
    roots = (Path(loracle.__file__).parent, Path(__file__).parent)
    digest = sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def dated(name: str, device: str, *, folder: str = "results/benchmarks") -> Path:
    """Returns ``<folder>/<name>-<date>-<device>.json``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(folder) / f"{name}-{datetime.now(UTC):%Y%m%d}-{slug}.json"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a result as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file, an unfinished last line left out; none without a file."""
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
    """Returns this process's peak so far: allocated on a GPU, resident set (VmHWM) on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / GIB
