"""What a step costs as runs, sequence length, batch and model grow, and what a placement saves.

    python benchmarks/scaling.py [--steps 2] [--only placement]

Random weights of published shapes, so it needs no model. Every point is a process of its own; a
point that is done is not done again (``runs/bench/scaling.jsonl``). Writes
``results/benchmarks/scaling-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blocks import logged, run_once
from bundles import Point, measure_point, point_figures
from figures import dated, sources_digest, table, write_report

_LOG = Path("runs/bench/scaling.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of each point")
    parser.add_argument("--geometry", default="smollm2-135m")
    parser.add_argument("--only", default="", metavar="WORD", help="series with it in their name")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure_point(Point(**json.loads(given.worker)["point"]))))
    else:
        series = series_of(given.geometry, steps=given.steps)
        run({name: points for name, points in series.items() if given.only in name})


def series_of(geometry: str, *, steps: int) -> dict[str, list[Point]]:
    """Returns the points of each series; in each, one thing changes."""
    sizes = ("tiny",) if geometry == "tiny" else ("half-smollm2", geometry, "smollm2-360m")
    points: dict[str, list[dict[str, Any]]] = {
        "runs in a bundle": [{"runs": count} for count in (1, 2, 4, 8)],
        "tokens per example": [{"length": length} for length in (64, 128, 256, 512)],
        "examples per step": [{"batch": batch} for batch in (1, 2, 4, 8, 16)],
        "model": [{"geometry": size} for size in sizes],
        "placement, second epoch": [
            {"epochs": 2},
            {"epochs": 2, "placement": "last-third"},
            {"epochs": 2, "placement": "last-third", "trunk": True},
        ],
    }
    return {
        name: [Point(**({"geometry": geometry, "steps": steps} | each)) for each in series]
        for name, series in points.items()
    }


def run(series: dict[str, list[Point]]) -> None:
    """Measures what is missing and writes the report."""
    sources = sources_digest()
    specs = {
        name: [{"sources": sources, "point": asdict(point)} for point in points]
        for name, points in series.items()
    }
    for name, each in specs.items():
        for spec in each:
            row = run_once(spec, script=__file__, log=_LOG)
            if row is not None:
                print(name, _changed(spec["point"]), point_figures(row), flush=True)
    blocks = {name: logged(_LOG, each) for name, each in specs.items()}
    report = report_of(blocks)
    path = dated("scaling", report["environment"]["device"]["name"])
    write_report(path, report)
    print(f"\n{markdown(report)}\n\nwritten to {path}")


def report_of(blocks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the report of the logged blocks."""
    worked = [block for each in blocks.values() for block in each if block["error"] is None]
    return {
        "schema": 1,
        "what": "seconds per step of a bundle, median after a warm-up; random weights",
        "environment": worked[0]["environment"],
        "series": {
            name: [{"point": block["spec"]["point"], **point_figures(block)} for block in each]
            for name, each in blocks.items()
        },
        "blocks": blocks,
    }


def markdown(report: dict[str, Any]) -> str:
    """Returns one table per series."""
    parts = []
    for name, entries in report["series"].items():
        rows = [
            (
                _changed(entry["point"]),
                f"{entry['step_time_s']:.2f}",
                f"{entry['tokens_per_s']:.0f}",
                f"{entry['peak_gib']:.2f}",
            )
            for entry in entries
            if "step_time_s" in entry
        ]
        parts.append(table((name, "s per step", "tokens per s", "peak GiB"), rows))
    return "\n\n".join(parts)


def _changed(point: dict[str, Any]) -> str:
    """Returns what is not as by default, in words."""
    plain = asdict(Point(geometry="smollm2-135m", steps=point["steps"]))
    words = [f"{key} {value}" for key, value in point.items() if value != plain[key]]
    return ", ".join(words) or "as by default"


if __name__ == "__main__":
    main()
