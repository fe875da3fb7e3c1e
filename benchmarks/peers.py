"""Our loop and the peers', side by side on one machine.

    make bench        or        python benchmarks/peers.py --rounds 3 --steps 3

Same model, data, batches, initial adapters and hyper-parameters. Every block (one contender: load,
a warm-up step, a few timed steps) runs in its own process, so that its peak memory is its own, and
the contenders alternate, so that other load on the machine affects all of them. A finished block is
not repeated, so the benchmark can be stopped and restarted at any time; the rows are in
``runs/bench/peers.jsonl``. TRL's tuned settings are chosen first, by trying them.

Writes ``results/benchmarks/peers-<date>-<device>.json``; ``--markdown FILE`` prints its table.
``--check`` compares losses instead, without dropout, so that all contenders must agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()
_LOG = Path("runs/bench/peers.jsonl")
_TUNING_STEPS = 3

Row = dict[str, Any]


def main() -> None:
    given = _arguments()
    if given.worker:
        print(json.dumps(run_block(json.loads(given.worker))))
    elif given.markdown:
        from standings import markdown

        print(markdown(json.loads(given.markdown.read_text(encoding="utf-8"))))
    elif given.check:
        sys.exit(check(given.set, names=given.only))
    else:
        bench(rounds=given.rounds, steps=given.steps, overrides=given.set, only=given.only)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each contender")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of each block after the warm-up"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", action="append", metavar="CONTENDER")
    parser.add_argument("--check", action="store_true", help="compare losses, without dropout")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print a result's table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def bench(*, rounds: int, steps: int, overrides: Sequence[str], only: list[str] | None) -> None:
    """Runs what is missing, block by block, and writes the report."""
    from blocks import logged
    from contenders import CONTENDERS, TUNED
    from figures import publish, sources_digest
    from standings import markdown, summarise
    from workload import open_source

    open_source(overrides)  # fetches what is missing; the blocks run offline
    key = {"sources": sources_digest(), "overrides": list(overrides)}
    names = only or [*CONTENDERS, "trl-tuned", "trl-tuned-system", "floor"]
    trials = [
        key | {"contender": f"tune:{name}", "round": 0, "rounds": 1, "steps": _TUNING_STEPS}
        for name in (TUNED if any(name.startswith("trl-tuned") for name in names) else ())
    ]
    for spec in trials:
        run_logged(spec)
    tuned = fastest_of(logged(_LOG, trials)) if trials else None
    key |= {"steps": steps, "rounds": rounds, "tuned": tuned}
    specs = [key | {"contender": name, "round": turn} for turn in range(rounds) for name in names]
    for spec in specs:
        run_logged(spec)
    report = summarise(logged(_LOG, trials + specs), tuned=tuned)
    publish("peers", report, text=f"{markdown(report)}\n\n{report['loss_table']}")


def fastest_of(blocks: Sequence[Row]) -> str:
    """Returns the candidate with the fewest seconds per real token."""
    from figures import counted, seconds_per_token

    worked = [block for block in blocks if block["error"] is None]
    if not worked:
        raise SystemExit("none of TRL's settings works here; see runs/bench/peers.jsonl")
    best = min(worked, key=lambda block: seconds_per_token(counted(block["rows"])))
    return str(best["spec"]["contender"].removeprefix("tune:"))


def run_logged(spec: Row) -> None:
    """Runs a block unless it is logged already, and prints its times and peak."""
    from blocks import run_once

    started_at = time.perf_counter()
    row = run_once(spec, script=__file__, log=_LOG)
    if row is None:
        return
    times = [f"{r['step_time_s']:.2f}" for r in row["rows"] if "step_time_s" in r]
    failed = f" FAILED: {row['error']}" if row["error"] else ""
    block_s = time.perf_counter() - started_at
    print(
        f"round {spec['round'] + 1} {spec['contender']}: steps {' '.join(times) or '-'} s, "
        f"peak {row['peak_gib'] or 0:.2f} GiB, block {block_s:.0f} s{failed}",
        flush=True,
    )


def run_block(spec: Row) -> Row:
    """Returns the measurements of one block, in a process of its own."""
    from figures import block_of
    from workload import grouped_batches, open_source, random_batches, settings_of, workload_of

    source = open_source(spec["overrides"])
    contender = contender_of(spec)
    part, steps = spec["round"], spec["steps"]
    if contender is not None and contender.grouped:
        batches = grouped_batches(source, part=part, num_parts=spec["rounds"], num_steps=steps)
    else:
        batches = random_batches(source, part=part, num_steps=steps)
    work = workload_of(source, batches)
    started_at = time.perf_counter()
    if contender is None:
        from floor import floor_rows

        rows = floor_rows(work)
    else:
        from contenders import run_contender

        rows = run_contender(contender, work)
    stepping = sum(row.get("step_time_s", 0.0) for row in rows)
    return block_of(
        rows,
        device=work.device,
        dtype=work.dtype,
        import_and_data_s=started_at - _STARTED,
        load_and_build_s=time.perf_counter() - started_at - stepping,
        settings=settings_of(source),
    )


def contender_of(spec: Row) -> Any:
    """Returns the contender of a block; None for the matrix-product floor."""
    from contenders import CONTENDERS, TUNED, tuned_pair

    name = spec["contender"]
    if name == "floor":
        return None
    if name.startswith("tune:"):
        return TUNED[name.removeprefix("tune:")]
    return (CONTENDERS | tuned_pair(spec["tuned"] or next(iter(TUNED))))[name]


def check(overrides: Sequence[str], *, names: list[str] | None) -> int:
    """Prints the losses of all contenders without dropout; returns 1 if one disagrees with ours."""
    import torch

    from contenders import CONTENDERS, run_contender
    from workload import open_source, random_batches, workload_of

    source = open_source(["lora.dropout=0.0", *overrides])
    work = workload_of(source, random_batches(source, part=0, num_steps=2))
    tolerance = 1e-4 if work.dtype == torch.float32 else 1e-2
    ours: list[float] = []
    worst = 0.0
    for name in ["loracle", *(names or [name for name in CONTENDERS if name != "loracle"])]:
        rows = run_contender(CONTENDERS[name], work)
        losses = [row["loss_nats_per_token"] for row in rows]
        ours = ours or losses
        gap = max(abs(a / b - 1) for a, b in zip(losses, ours, strict=True))
        worst = max(worst, gap)
        print(f"{name:12} {' '.join(f'{loss:.5f}' for loss in losses)}  off by {gap:.1e}")
    print(f"tolerance {tolerance:g}: {'agree' if worst <= tolerance else 'DISAGREE'}")
    return int(worst > tolerance)


if __name__ == "__main__":
    main()
