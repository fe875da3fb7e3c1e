"""The engine on a GPU with random weights: correctness, bundles, a 7B in 16 and 4 bits, the peers.

    python benchmarks/gpu.py [--wheels DIR] [--only WORD ...] [--minutes 9]

``gpu.md`` says in which order. The first block compares the device with the CPU; where it fails,
nothing is timed. Speed and memory do not depend on the weights, so the machine needs no model and
no network. With
``--wheels`` the wheels in a folder (TRL, jaxtyping, pydantic, ...) are installed beside the
environment first, visible to this benchmark only. Every block runs in its own process; a finished
block is not repeated (``runs/bench/gpu.jsonl``), and one that takes ten minutes is given up. Writes
``results/gpu/engine-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LOG = Path("runs/bench/gpu.jsonl")
_SITE = Path("runs/bench/site")
_BLOCK_S = 600.0
CORRECT = "device against CPU"
_ROOT = Path(__file__).resolve().parents[1]

Spec = dict[str, Any]


def main() -> None:
    given = _arguments()
    if given.wheels:
        start_again_with(given.wheels, script=Path(__file__))
    if given.worker:
        print(json.dumps(measure(json.loads(given.worker))))
        return
    specs = specs_of(small=given.small, large=given.large, steps=given.steps)
    words = given.only or [""]
    chosen = {n: spec for n, spec in specs.items() if any(word in n for word in words)}
    run(chosen, out=given.out, minutes=given.minutes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these wheels first")
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="blocks with WORD in their name"
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="steps of each block after the warm-up"
    )
    parser.add_argument(
        "--minutes", type=float, default=None, help="start no block after so many; go on later"
    )
    parser.add_argument("--small", default="smollm2-135m", metavar="GEOMETRY")
    parser.add_argument("--large", default="llama-2-7b", metavar="GEOMETRY")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def start_again_with(wheels: Path, *, script: Path) -> None:
    """Installs the wheels beside the environment; restarts in a process that sees them."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--upgrade", "--target", str(_SITE), *files], check=True)
    folders = [str(_SITE.resolve()), str(_ROOT / "src"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(folder for folder in folders if folder)
    words = [
        word
        for before, word in itertools.pairwise(sys.argv)
        if not word.startswith("--wheels") and before != "--wheels"
    ]
    os.execve(
        sys.executable, [sys.executable, str(script), *words], os.environ | {"PYTHONPATH": path}
    )


def specs_of(*, small: str, large: str, steps: int) -> dict[str, Spec]:
    """Returns the specifications of the blocks by name."""
    blocks: dict[str, Spec] = {
        CORRECT: {"kind": "correct", "geometry": small},
        "matrix rate": {"kind": "rate"},
    }
    peers = ["peft-loop"]
    if importlib.util.find_spec("trl") is not None:
        peers += ["trl-bf16", "trl-shipped"]
    for geometry, batch, packing in (
        (large, 8, None),
        (large, 8, "nf4"),
        (large, 4, None),
        (small, 8, None),
    ):
        named = f"{geometry}{', NF4' if packing else ''}, batch {batch}"
        ours = _ours(geometry, runs=1, batch=batch, steps=steps, packing=packing)
        blocks[named] = ours
        for peer in peers:
            blocks[f"{named}, {peer}"] = {
                "kind": "peer",
                "contender": peer,
                "geometry": geometry,
                "batch": batch,
                "packing": packing,
                "steps": steps,
            }
        # Once more at the end: a device that became slower meanwhile is seen.
        blocks[f"{named}, again"] = ours
    for runs in (1, 4, 8, 16):
        blocks[f"{small}, bundle of {runs}"] = _ours(small, runs=runs, batch=8, steps=steps)
    return blocks


def _ours(geometry: str, *, runs: int, batch: int, steps: int, packing: str | None = None) -> Spec:
    point = {"geometry": geometry, "runs": runs, "batch": batch, "steps": steps}
    packed = {"packing": packing, "checkpointing": packing is not None}
    return {"kind": "ours", "point": point | packed}


def measure(spec: Spec) -> dict[str, Any]:
    """Returns the measurements of one block, in a process of its own."""
    if spec["kind"] == "correct":
        from correctness import compare

        return compare(spec["geometry"])
    if spec["kind"] == "rate":
        return _rate()
    if spec["kind"] == "peer":
        return _peer(spec)
    from bundles import Point, measure_point

    return measure_point(Point(**spec["point"]))


def _rate() -> dict[str, Any]:
    """Returns the best rate of one large square product, the most that the device can give."""
    import loracle
    from figures import block_of
    from floor import product_s

    device = loracle.choose_device("auto")
    dtype = loracle.choose_dtype("auto", device=device)
    size = 8192 if device.type == "cuda" else 512
    best = min(product_s((size, size, size), device=device, dtype=dtype) for _ in range(3))
    rate = 2 * size**3 / best / 1e9
    return block_of([], device=device, dtype=dtype, peak_gib=None, gflop_per_s=rate)


def _peer(spec: Spec) -> dict[str, Any]:
    from contenders import CONTENDERS, run_contender
    from figures import block_of
    from workload import random_work

    work = random_work(
        spec["geometry"],
        num_steps=spec["steps"],
        batch_size=spec["batch"],
        packing=spec.get("packing"),
    )
    rows = run_contender(CONTENDERS[spec["contender"]], work)
    return block_of(rows, device=work.device, dtype=work.dtype)


def run(specs: dict[str, Spec], *, out: Path, minutes: float | None = None) -> None:
    """Measures what is missing and writes the report; times nothing where the device is wrong."""
    from blocks import logged, run_once
    from figures import publish, sources_digest

    sources = sources_digest()
    keyed = {name: {"sources": sources, "name": name, **spec} for name, spec in specs.items()}
    ends_at = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    for name, spec in keyed.items():
        if time.monotonic() >= ends_at:
            print("the time is over; the same command goes on", file=sys.stderr)
            break
        row = run_once(spec, script=__file__, log=_LOG, limit_s=_BLOCK_S)
        if row is not None:
            print(name, row["error"] or row.get("checks") or figures_of(row, rate=None), flush=True)
        if name == CORRECT and (wrong := logged(_LOG, [spec])[0]["error"]):
            raise SystemExit(f"{CORRECT}: {wrong}; nothing was timed")
    report = report_of(logged(_LOG, list(keyed.values())))
    publish("engine", report, text=f"\n{markdown(report)}", folder=str(out))


def figures_of(block: dict[str, Any], *, rate: float | None) -> dict[str, Any]:
    """Returns a block's figures: seconds per step, rates, share of the matrix rate, peak."""
    from figures import counted, step_figures

    rows = counted(block["rows"])
    if not rows:
        return {"gflop_per_s": block.get("gflop_per_s")}
    figures = step_figures(rows)
    speed = figures["gflop_per_s"]
    share = speed / rate if rate and speed else None
    return figures | {"share_of_matrix_rate": share, "peak_gib": block["peak_gib"]}


def report_of(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the report of the logged blocks, with bundles compared to their runs in turn."""
    worked = [block for block in blocks if block["error"] is None]
    rates = [block["gflop_per_s"] for block in worked if block["spec"]["kind"] == "rate"]
    rate = rates[0] if rates else None
    figures = {block["spec"]["name"]: figures_of(block, rate=rate) for block in worked}
    for block in worked:
        speed_up = _over_in_turn(block, worked)
        if speed_up is not None:
            figures[block["spec"]["name"]]["times_the_same_runs_in_turn"] = speed_up
    return {
        "schema": 1,
        "what": "random weights; median seconds per step after a warm-up; memory: allocated",
        "environment": worked[0]["environment"],
        "matrix_rate_gflop_per_s": rate,
        "figures": figures,
        "failed": {b["spec"]["name"]: b["error"] for b in blocks if b["error"] is not None},
        "blocks": list(blocks),
    }


def _over_in_turn(block: dict[str, Any], others: Sequence[dict[str, Any]]) -> float | None:
    """Returns a bundle's tokens per second over those of one of its runs alone."""
    point = block["spec"].get("point")
    if point is None or point["runs"] == 1:
        return None
    alone = [other for other in others if other["spec"].get("point") == point | {"runs": 1}]
    if not alone:
        return None
    together_per_s, alone_per_s = (
        figures_of(compared, rate=None)["tokens_per_s"] for compared in (block, alone[0])
    )
    return float(together_per_s / alone_per_s)


def markdown(report: dict[str, Any]) -> str:
    """Returns the table of a report."""
    from figures import table

    rows = [
        (
            name,
            f"{figures['step_time_s']:.3f}",
            f"{figures['tokens_per_s']:.0f}",
            _or_na(figures["share_of_matrix_rate"], "{:.2f}"),
            _or_na(figures.get("times_the_same_runs_in_turn"), "{:.1f}"),
            f"{figures['peak_gib']:.2f}",
        )
        for name, figures in report["figures"].items()
        if "step_time_s" in figures
    ]
    header = ("what", "s per step", "tokens per s", "share of matrix rate", "times in turn", "GiB")
    return table(header, rows)


def _or_na(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


if __name__ == "__main__":
    main()
