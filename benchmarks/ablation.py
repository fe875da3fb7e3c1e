"""Each trick of the engine switched off in turn, beside the whole engine, step by step.

    python benchmarks/ablation.py [--steps 3] [--set KEY=VALUE]

Every batch is trained once with all tricks and once without each, in one process, at a learning
rate near zero, so that all variants have the same weights and comparable losses. The allocator
setting cannot be reverted in a process, so it has processes of its own. Writes
``results/benchmarks/ablation-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from blocks import logged, run_once
from figures import Row, block_of, bootstrap, counted, publish, sources_digest, table

_LOG = Path("runs/bench/ablation.jsonl")
_WHOLE = "whole engine"
_ALLOCATOR_ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="batches after the warm-up")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", action="append", default=[], metavar="TRICK")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(json.loads(given.worker))))
    else:
        run(steps=given.steps, overrides=given.set, only=given.only)


def run(*, steps: int, overrides: Sequence[str], only: Sequence[str]) -> None:
    """Measures what is missing and writes the report."""
    key = {"sources": sources_digest(), "overrides": list(overrides), "steps": steps}
    tricks = [key | {"allocator": True, "tricks": list(only), "round": 0}]
    allocator = [
        key | {"allocator": is_on, "tricks": [_WHOLE], "round": turn}
        for turn in range(_ALLOCATOR_ROUNDS)
        for is_on in (True, False)
    ]
    for spec in tricks + allocator:
        run_once(spec, script=__file__, log=_LOG)
    report = report_of(logged(_LOG, tricks), logged(_LOG, allocator))
    publish("ablation", report, text=markdown(report))


def measure(spec: Row) -> Row:
    """Returns the steps of every variant on every batch, in a process of its own."""
    import loracle
    from loracle.engine.device import keep_large_blocks
    from tricks import TRICKS
    from workload import (
        FixedOrder,
        counts_of,
        load_frozen,
        open_source,
        plan_of,
        random_batches,
        start_run,
        workload_of,
    )

    if spec["allocator"]:
        keep_large_blocks()
    source = open_source(["train.learning_rate=1e-30", *spec["overrides"]])
    work = workload_of(source, random_batches(source, part=0, num_steps=spec["steps"]))
    base = load_frozen(work)
    variants = [_WHOLE, *(name for name in TRICKS if not spec["tricks"] or name in spec["tricks"])]
    repeated = [batch for batch in work.batches for _ in variants]
    train = work.config.train.model_copy(update={"max_steps": len(repeated)})
    config = work.config.model_copy(update={"train": train})
    plan = plan_of(base.model, config)
    run = start_run(base, config=config, plan=plan, examples=work.batches[0])
    run = replace(run, order=FixedOrder(repeated))
    steps = loracle.train_bundle(base, [run], micro_batch_tokens=train.micro_batch_tokens)
    rows = []
    for index, batch in enumerate(work.batches):
        for name in variants:
            with TRICKS[name].without(base) if name in TRICKS else nullcontext():
                record = next(steps)[0]
            rows.append(
                {
                    "variant": name,
                    "step": index,
                    "warm_up": index == 0,
                    "step_time_s": record.step_time_s,
                    "loss_nats_per_token": record.loss_nats_per_token,
                    "grad_norm": record.grad_norm,
                    **counts_of(batch),
                }
            )
    return block_of(rows, device=work.device, dtype=work.dtype, peak_gib=None)


def report_of(tricks: Sequence[Row], allocator: Sequence[Row]) -> Row:
    """Returns, for each trick, a step's time without it over its time with all."""
    from tricks import TRICKS

    rows = [row for block in tricks for row in counted(block["rows"])]
    whole = {row["step"]: row for row in rows if row["variant"] == _WHOLE}
    figures = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        same_step = [(row, whole[row["step"]]) for row in rows if row["variant"] == name]
        times, losses = (
            [(row[key], reference[key]) for row, reference in same_step]
            for key in ("step_time_s", "loss_nats_per_token")
        )
        figures[name] = _figures(times) | {
            "instead": TRICKS[name].instead if name in TRICKS else "everything on",
            "largest_loss_gap_nats": max(abs(a - b) for a, b in losses),
        }
    if allocator:
        figures["large blocks kept by malloc"] = _figures(_allocator_pairs(allocator)) | {
            "instead": "glibc's defaults, in processes of its own",
            "largest_loss_gap_nats": 0.0,
        }
    return {
        "schema": 1,
        "what": "seconds per step without one trick over seconds with all, same batches",
        "environment": tricks[0]["environment"],
        "figures": figures,
        "rows": rows,
    }


def _allocator_pairs(blocks: Sequence[Row]) -> list[tuple[float, float]]:
    """Returns (without, with) of each batch in each round."""
    times = {
        (block["spec"]["allocator"], block["spec"]["round"], row["step"]): row["step_time_s"]
        for block in blocks
        for row in counted(block["rows"])
    }
    return [
        (time, times[True, turn, step]) for (is_on, turn, step), time in times.items() if not is_on
    ]


def _figures(pairs: Sequence[tuple[float, float]]) -> Row:
    def ratio(drawn: Sequence[tuple[float, float]]) -> float:
        return statistics.median(without / whole for without, whole in drawn)

    return {
        "step_time_s": statistics.median(without for without, _ in pairs),
        "times_whole": ratio(pairs),
        "times_whole_95": bootstrap(pairs, ratio),
    }


def markdown(report: Row) -> str:
    """Returns the ablation table."""
    rows = []
    for name, figures in report["figures"].items():
        low, high = figures["times_whole_95"]
        ratio = f"{figures['times_whole']:.2f} [{low:.2f} to {high:.2f}]"
        rows.append((f"{name} → {figures['instead']}", f"{figures['step_time_s']:.2f}", ratio))
    return table(("trick → instead", "s per step", "times the whole engine's"), rows)


if __name__ == "__main__":
    main()
