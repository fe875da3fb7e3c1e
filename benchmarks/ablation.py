"""Each trick of the engine off in turn, beside the whole engine, step by step in one process.

    python benchmarks/ablation.py [--steps 3] [--set KEY=VALUE]

Every batch is taken once with all tricks and once without each of them, at a learning rate of
nothing, so that all variants have the same weights and their losses can be compared. The allocator
setting cannot be taken back in a process, so it has processes of its own. Writes
``results/benchmarks/ablation-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blocks import logged, run_once
from figures import bootstrap, dated, environment_of, sources_digest, table, write_report

_LOG = Path("runs/bench/ablation.jsonl")
_WHOLE = "whole engine"
_ALLOCATOR_ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="counted batches")
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
        key | {"allocator": told, "tricks": [_WHOLE], "round": turn}
        for turn in range(_ALLOCATOR_ROUNDS)
        for told in (True, False)
    ]
    for spec in tricks + allocator:
        run_once(spec, script=__file__, log=_LOG)
    report = report_of(logged(_LOG, tricks), logged(_LOG, allocator))
    path = dated("ablation", report["environment"]["device"]["name"])
    write_report(path, report)
    print(f"{markdown(report)}\n\nwritten to {path}")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the steps of every variant on every batch; the process is its own."""
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
        workload_of,
    )

    if spec["allocator"]:
        keep_large_blocks()
    source = open_source(["train.learning_rate=1e-30", *spec["overrides"]])
    work = workload_of(source, random_batches(source, part=0, num_steps=spec["steps"]))
    config = work.config
    base = load_frozen(work)
    adapter = loracle.attach_adapter(
        base,
        name="default",
        plan=plan_of(base.model, config),
        dropout=config.lora.dropout,
        seed=config.seed,
        model_source=config.model,
    )
    variants = [_WHOLE, *(name for name in TRICKS if not spec["tricks"] or name in spec["tricks"])]
    repeated = [batch for batch in work.batches for _ in variants]
    run = loracle.new_run(
        base,
        adapter=adapter,
        examples=work.batches[0],
        train=config.train.model_copy(update={"max_steps": len(repeated)}),
        dropout=config.lora.dropout,
        seed=config.seed,
    )
    run = replace(run, order=FixedOrder(repeated))
    steps = loracle.train_bundle(base, [run], micro_batch_tokens=config.train.micro_batch_tokens)
    rows = []
    for index, batch in enumerate(work.batches):
        for name in variants:
            without = TRICKS[name].without if name in TRICKS else None
            record = _step(steps, without, base)
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
    environment = environment_of(work.device, work.dtype)
    shared = {"sources": sources_digest(), "environment": environment, "peak_gib": None}
    return {"error": None, "rows": rows, **shared}


def _step(steps: Any, without: Any, base: Any) -> Any:
    if without is None:
        return next(steps)[0]
    with without(base):
        return next(steps)[0]


def report_of(tricks: Sequence[dict[str, Any]], allocator: Sequence[dict[str, Any]]) -> dict:
    """Returns, for each trick, how many times as long a step takes without it."""
    from tricks import TRICKS

    rows = [row for block in tricks for row in block["rows"] if not row["warm_up"]]
    whole = {row["step"]: row for row in rows if row["variant"] == _WHOLE}
    figures = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        pairs = [(row["step_time_s"], whole[row["step"]]["step_time_s"]) for row in mine]
        gaps = [
            abs(row["loss_nats_per_token"] - whole[row["step"]]["loss_nats_per_token"])
            for row in mine
        ]
        what = TRICKS[name].instead if name in TRICKS else "everything on"
        figures[name] = _figures(pairs) | {"instead": what, "largest_loss_gap_nats": max(gaps)}
    if allocator:
        figures["large blocks kept by malloc"] = _figures(_allocator_pairs(allocator)) | {
            "instead": "glibc as it comes, in processes of its own",
            "largest_loss_gap_nats": 0.0,
        }
    return {
        "schema": 1,
        "what": "seconds per step without one trick over seconds with all, same batches",
        "environment": tricks[0]["environment"],
        "figures": figures,
        "rows": rows,
    }


def _allocator_pairs(blocks: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Returns (without, with) of each batch in each round."""
    times = {
        (block["spec"]["allocator"], block["spec"]["round"], row["step"]): row["step_time_s"]
        for block in blocks
        for row in block["rows"]
        if not row["warm_up"]
    }
    return [
        (time, times[True, turn, step]) for (told, turn, step), time in times.items() if not told
    ]


def _figures(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    def ratio(drawn: Sequence[tuple[float, float]]) -> float:
        return statistics.median(without / whole for without, whole in drawn)

    return {
        "step_time_s": statistics.median(without for without, _ in pairs),
        "times_whole": ratio(pairs),
        "times_whole_95": bootstrap(pairs, ratio),
    }


def markdown(report: dict[str, Any]) -> str:
    """Returns the ablation table."""
    rows = []
    for name, each in report["figures"].items():
        low, high = each["times_whole_95"]
        ratio = f"{each['times_whole']:.2f} [{low:.2f} to {high:.2f}]"
        rows.append((f"{name} → {each['instead']}", f"{each['step_time_s']:.2f}", ratio))
    return table(("trick → instead", "s per step", "times the whole engine's"), rows)


if __name__ == "__main__":
    main()
