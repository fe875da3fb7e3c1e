"""Our loop and the peers', side by side on one machine.

    make bench        or        python benchmarks/peers.py --rounds 3 --steps 3

Same model, data, batches, initial adapters and hyper-parameters. Every block (one contender: load,
a warm-up step that is not counted, a few steps that are) is a process of its own, so that its peak
memory is its own, and the contenders take turns, so that what else the machine does hits all of
them. A block that is done is not done again: stop it and start it as you like, the rows are in
``runs/bench/peers.jsonl``. TRL's tuned settings are chosen first, by trying them.

Writes ``results/benchmarks/peers-<date>-<device>.json``; ``--markdown FILE`` prints its table.
``--check`` compares losses instead: dropout 0, so that all contenders must give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()
_LOG = Path("runs/bench/peers.jsonl")
_TUNING_STEPS = 2

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
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each block")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", action="append", metavar="CONTENDER")
    parser.add_argument("--check", action="store_true", help="compare losses, without dropout")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print a result's table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def bench(*, rounds: int, steps: int, overrides: Sequence[str], only: list[str] | None) -> None:
    """Runs what is missing, block by block, and writes the report."""
    from contenders import CONTENDERS, TUNED
    from figures import dated, read_lines, sources_digest, write_report
    from standings import markdown, summarise
    from workload import open_source

    key = {"sources": sources_digest(), "overrides": list(overrides), "steps": steps}
    key["rounds"] = rounds
    open_source(overrides)  # fetches what is missing; the blocks run offline
    names = only or [*CONTENDERS, "trl-tuned", "trl-tuned-system", "floor"]
    tuned: str | None = None
    if any(name.startswith("trl-tuned") for name in names):
        for candidate in TUNED:
            spec = key | {"contender": f"tune:{candidate}", "round": 0, "steps": _TUNING_STEPS}
            run_once(spec | {"rounds": 1})
        tuned = fastest_of(rows_of(read_lines(_LOG), key["sources"], prefix="tune:"))
    for turn in range(rounds):
        for name in names:
            run_once(key | {"contender": name, "round": turn, "tuned": tuned})
    blocks = [row for row in read_lines(_LOG) if row["spec"]["sources"] == key["sources"]]
    wanted = [row for row in blocks if _belongs(row, names=names, key=key, tuned=tuned)]
    report = summarise(wanted, tuned=tuned)
    path = dated("peers", report["environment"]["device"]["name"])
    write_report(path, report)
    print(f"{markdown(report)}\n\n{report['loss_table']}\n\nwritten to {path}")


def _belongs(row: Row, *, names: Iterable[str], key: Row, tuned: str | None) -> bool:
    spec = row["spec"]
    if spec["contender"].startswith("tune:"):
        return spec["overrides"] == key["overrides"] and tuned is not None
    return spec["contender"] in names and spec == key | {
        "contender": spec["contender"], "round": spec["round"], "tuned": tuned
    }  # fmt: skip


def rows_of(blocks: Iterable[Row], sources: str, *, prefix: str) -> list[Row]:
    """Returns the blocks of one state of the sources whose contender begins with ``prefix``."""
    return [
        block
        for block in blocks
        if block["spec"]["sources"] == sources and block["spec"]["contender"].startswith(prefix)
    ]


def fastest_of(blocks: Sequence[Row]) -> str:
    """Returns the candidate with the fewest seconds per real token."""
    worked = [block for block in blocks if block["error"] is None]
    if not worked:
        raise SystemExit("none of TRL's settings works here; see runs/bench/peers.jsonl")
    best = min(worked, key=lambda block: seconds_per_token(block["rows"]))
    return str(best["spec"]["contender"].removeprefix("tune:"))


def seconds_per_token(rows: Iterable[Row]) -> float:
    """Returns the counted seconds over the counted real tokens."""
    counted = [row for row in rows if not row["warm_up"]]
    return sum(r["step_time_s"] for r in counted) / sum(r["num_tokens"] for r in counted)


def run_once(spec: Row) -> None:
    """Runs a block in a process of its own and logs it, unless it is logged already."""
    from figures import append_line, read_lines

    if any(row["spec"] == spec for row in read_lines(_LOG)):
        return
    began = time.perf_counter()
    command = [sys.executable, __file__, "--worker", json.dumps(spec)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, env=offline, stdout=subprocess.PIPE, text=True, check=False)
    failed = {"error": f"exit status {done.returncode}", "rows": [], "peak_gib": None}
    row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed
    if row.get("sources", spec["sources"]) != spec["sources"]:
        raise SystemExit("the sources changed while the benchmark ran; start it again")
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(_LOG, {"spec": spec, "ended_at": ended, **row})
    times = [f"{r['step_time_s']:.2f}" for r in row["rows"] if "step_time_s" in r]
    print(f"round {spec['round'] + 1} {spec['contender']}: steps {' '.join(times) or '-'} s, "
          f"peak {row['peak_gib'] or 0:.2f} GiB, block {time.perf_counter() - began:.0f} s"
          f"{' FAILED: ' + row['error'] if row['error'] else ''}", flush=True)  # fmt: skip


def run_block(spec: Row) -> Row:
    """Returns what one block measured; the process is its own."""
    from figures import environment_of, peak_gib, sources_digest
    from workload import (
        grouped_batches,
        open_source,
        random_batches,
        settings_of,
        workload_of,
    )

    source = open_source(spec["overrides"])
    contender = contender_of(spec)
    part, steps = spec["round"], spec["steps"]
    if contender is not None and contender.grouped:
        batches = grouped_batches(source, part=part, num_parts=spec["rounds"], num_steps=steps)
    else:
        batches = random_batches(source, part=part, num_steps=steps)
    work = workload_of(source, batches)
    began = time.perf_counter()
    if contender is None:
        from floor import floor_rows

        rows = floor_rows(work)
    else:
        from contenders import run_contender

        rows = run_contender(contender, work)
    stepping = sum(row.get("step_time_s", 0.0) for row in rows)
    return {
        "error": None,
        "rows": rows,
        "peak_gib": peak_gib(work.device),
        "import_and_data_s": began - _STARTED,
        "load_and_build_s": time.perf_counter() - began - stepping,
        "sources": sources_digest(),
        "settings": settings_of(source),
        "environment": environment_of(work.device, work.dtype),
    }


def contender_of(spec: Row) -> Any:
    """Returns the contender that a block names; None for the matrix-product floor."""
    from contenders import CONTENDERS, TUNED, tuned_pair

    name = spec["contender"]
    if name == "floor":
        return None
    if name.startswith("tune:"):
        return TUNED[name.removeprefix("tune:")]
    return (CONTENDERS | tuned_pair(spec["tuned"] or next(iter(TUNED))))[name]


def check(overrides: Sequence[str], *, names: list[str] | None, steps: int = 3) -> int:
    """Prints the losses of all contenders without dropout; returns 1 if one disagrees with ours."""
    import torch

    from contenders import CONTENDERS, run_contender
    from workload import open_source, random_batches, workload_of

    source = open_source(["lora.dropout=0.0", *overrides])
    work = workload_of(source, random_batches(source, part=0, num_steps=steps - 1))
    tolerance = 1e-4 if work.dtype == torch.float32 else 1e-2
    ours: list[float] = []
    worst = 0.0
    for name in ["loracle", *(names or [each for each in CONTENDERS if each != "loracle"])]:
        rows = run_contender(CONTENDERS[name], work)
        losses = [row["loss_nats_per_token"] for row in rows]
        ours = ours or losses
        gap = max(abs(one / other - 1) for one, other in zip(losses, ours, strict=True))
        worst = max(worst, gap)
        print(f"{name:12} {' '.join(f'{loss:.5f}' for loss in losses)}  off by {gap:.1e}")
    print(f"tolerance {tolerance:g}: {'agree' if worst <= tolerance else 'DISAGREE'}")
    return int(worst > tolerance)


if __name__ == "__main__":
    main()
