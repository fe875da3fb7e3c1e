"""The cost of a step by number of runs, sequence length, batch, model and placement.

    python benchmarks/scaling.py [--steps 2] [--only placement]

Random weights of published shapes, so it needs no model. Every point runs in its own process; a
measured point is not repeated (``runs/bench/scaling.jsonl``). Writes
``results/benchmarks/scaling-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from blocks import logged, run_once
from bundles import Point, measure_point, point_figures
from figures import Row, publish, sources_digest, table

_LOG = Path("runs/bench/scaling.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=2, help="steps of each point after the warm-up"
    )
    parser.add_argument("--geometry", default="smollm2-135m")
    parser.add_argument("--only", default="", metavar="WORD", help="series with WORD in their name")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure_point(Point(**json.loads(given.worker)["point"]))))
    else:
        series = series_of(given.geometry, steps=given.steps)
        run({name: points for name, points in series.items() if given.only in name})


def series_of(geometry: str, *, steps: int) -> dict[str, list[Point]]:
    """Returns the points of each series, in which one setting changes."""
    sizes = ("tiny",) if geometry == "tiny" else ("half-smollm2", geometry, "smollm2-360m")
    changes: dict[str, list[Row]] = {
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
        name: [Point(**({"geometry": geometry, "steps": steps} | change)) for change in series]
        for name, series in changes.items()
    }


def run(series: dict[str, list[Point]]) -> None:
    """Measures what is missing and writes the report."""
    sources = sources_digest()
    specs = {
        name: [{"sources": sources, "point": asdict(point)} for point in points]
        for name, points in series.items()
    }
    for name, points in specs.items():
        for spec in points:
            row = run_once(spec, script=__file__, log=_LOG)
            if row is not None:
                print(name, _changed(spec["point"]), point_figures(row), flush=True)
    report = report_of({name: logged(_LOG, points) for name, points in specs.items()})
    publish("scaling", report, text=f"\n{markdown(report)}")


def report_of(blocks: dict[str, list[Row]]) -> Row:
    """Returns the report of the logged blocks."""
    worked = [block for series in blocks.values() for block in series if block["error"] is None]
    return {
        "schema": 1,
        "what": "seconds per step of a bundle, median after a warm-up; random weights",
        "environment": worked[0]["environment"],
        "series": {
            name: [{"point": block["spec"]["point"], **point_figures(block)} for block in series]
            for name, series in blocks.items()
        },
        "blocks": blocks,
    }


def markdown(report: Row) -> str:
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


def _changed(point: Row) -> str:
    """Returns the settings that are not the defaults, in words."""
    defaults = asdict(Point(geometry="smollm2-135m", steps=point["steps"]))
    words = [f"{key} {value}" for key, value in point.items() if value != defaults[key]]
    return ", ".join(words) or "defaults"


if __name__ == "__main__":
    main()
