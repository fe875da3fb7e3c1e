"""python tests/cuda/table.py [--cards ...] [--cases ...] - a step on four pretended cards.

Runs step.py on each card with 2 and 4 layers of LLaMA-2-7B; their difference gives a layer's share,
and so the 32 layers of the whole. Rows are kept in ``runs/bench/pretended.jsonl`` under a digest of
the code, so an interrupted table goes on. Writes
``results/gpu/pretended-step-<date>-<commit>.json``: counts and peaks of a pretended card, no speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "src"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from run import CARDS, on_card
from step import CASES

from figures import append_line, read_lines, table, write_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_LOG = Path("runs/bench/pretended.jsonl")
_LAYERS = (2, 4)
_WHOLE = 32
_VERSIONS = ("torch", "triton", "transformers", "peft", "bitsandbytes")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    given = parser.parse_args()
    sources = _digest()
    for card in given.cards:
        _count_missing(card, given.cases, sources=sources)
    rows = [row for row in read_lines(_LOG) if row["sources"] == sources]
    report = report_of(rows, sources=sources)
    path = given.out / f"pretended-step-{report['date']}-{report['commit'][:7]}.json"
    write_report(path, report)
    print(f"{markdown(report['table'])}\n\nwritten to {path}")


def _digest() -> str:
    """Returns 12 hex digits over what is counted and what counts."""
    files = [
        *(ROOT / "src").rglob("*.py"),
        *(HERE / "pretend").glob("*.[ch]"),
        *(HERE / name for name in ("step.py", "moved.py")),
    ]
    digest = sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _count_missing(card: str, cases: list[str], *, sources: str) -> None:
    """Appends the rows that the log lacks, as one process on the card counts them."""
    rows = [row for row in read_lines(_LOG) if row["sources"] == sources]
    done = {row["case"] for row in rows if row["card"] == card and row["layers"] == _LAYERS[-1]}
    missing = [case for case in cases if case not in done]
    if not missing:
        return
    command = [sys.executable, HERE / "step.py", *missing, "--layers", *map(str, _LAYERS)]
    with subprocess.Popen(command, env=on_card(card), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                append_line(_LOG, {"sources": sources, "card": card, **json.loads(line)})
    if process.returncode:
        print(f"{card}: exit status {process.returncode}", file=sys.stderr)


def report_of(rows: list[Row], *, sources: str) -> Row:
    """Returns the report: how it was made, the table, and each counted step."""
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", "src", "benchmarks"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return {
        "schema": 1,
        "what": "one optimizer step of LLaMA-2-7B on a PRETENDED card: kernels were counted and "
        "not run; counts, bytes, peaks and host seconds, no speed of a card",
        "command": "python tests/cuda/table.py",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or "unknown",
        "sources_changed_since": bool(changed),
        "sources": sources,
        "versions": {name: version(name) for name in _VERSIONS},
        "table": [_figures(card, case, rows) for card, case in _pairs(rows)],
        "rows": rows,
    }


def _pairs(rows: list[Row]) -> list[tuple[str, str]]:
    whole = [row for row in rows if row["layers"] == _LAYERS[-1]]
    return sorted(dict.fromkeys((row["card"], row["case"]) for row in whole), key=_order)


def _order(pair: tuple[str, str]) -> tuple[int, int]:
    return CARDS.index(pair[0]), list(CASES).index(pair[1])


def _figures(card: str, case: str, rows: list[Row]) -> Row:
    """One line of the table: a layer's share, and the 32 layers."""
    few, more = (
        next(r for r in rows if (r["card"], r["case"], r["layers"]) == (card, case, layers))
        for layers in _LAYERS
    )

    def layer(key: str) -> float:
        return (more[key] - few[key]) / (more["layers"] - few["layers"])

    def whole(key: str) -> float:
        return few[key] + (_WHOLE - few["layers"]) * layer(key)

    return {
        "card": card,
        "case": case,
        "launches_per_layer_and_pass": layer("launches") / few["passes"],
        "products_per_layer_and_pass": layer("products") / few["passes"],
        "gbyte_per_layer": layer("gbyte"),
        "gbyte_beside_frozen_products_per_layer": layer("gbyte_beside_frozen_products"),
        "tflop_per_layer": layer("tflop"),
        "launches_of_32_layers": whole("launches"),
        "waits_per_step": more["waits"],
        "host_cpu_s_of_32_layers": whole("host_cpu_s"),
        "peak_gib_of_32_layers": whole("peak_gib"),
    }


_COLUMNS = {
    "launches, layer and pass": ("launches_per_layer_and_pass", "{:.0f}"),
    "of them products": ("products_per_layer_and_pass", "{:.0f}"),
    "GB, layer": ("gbyte_per_layer", "{:.1f}"),
    "beside frozen products": ("gbyte_beside_frozen_products_per_layer", "{:.1f}"),
    "TFLOP, layer": ("tflop_per_layer", "{:.2f}"),
    "launches, step": ("launches_of_32_layers", "{:.0f}"),
    "waits, step": ("waits_per_step", "{:.0f}"),
    "host s (CPU)": ("host_cpu_s_of_32_layers", "{:.2f}"),
    "peak GiB": ("peak_gib_of_32_layers", "{:.2f}"),
}


def markdown(rows: list[Row]) -> str:
    """Returns the table; a step is 8 x 512 tokens of each run, a pass 4 x 512 of each."""
    lines = [
        (
            f"{row['card']}, {row['case']}",
            *(form.format(row[key]) for key, form in _COLUMNS.values()),
        )
        for row in rows
    ]
    return table(("", *_COLUMNS), lines)


if __name__ == "__main__":
    main()
