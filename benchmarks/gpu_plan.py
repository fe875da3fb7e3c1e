"""Predicted against measured on a GPU: memory, step time and latency, with random weights.

    python benchmarks/gpu_plan.py [--wheels DIR] [--geometry llama-2-7b] [--steps 6]

For each way to train (16 bits or NF4, with checkpointing, four runs at once) and placement: a step
as ``loracle plan`` predicts it, and as ``max_memory_allocated`` and the clock measure it. The
device's speed is measured first, as ``loracle doctor --calibrate`` does. Writes
``results/gpu/plan-<date>-<device>.json``, and goes on with the rows that it lacks, also after
``--minutes``. Without a GPU it runs at ``--geometry tiny`` and measures no memory.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from figures import Row, dated, write_report
from geometry import GEOMETRIES, random_base
from gpu import start_again_with
from loracle.config.files import load_config
from loracle.config.run import Config
from loracle.engine.decode import Answering
from loracle.engine.device import choose_device, choose_dtype, dtype_name, synchronize
from loracle.engine.train import train_bundle
from loracle.errors import OutOfMemory
from loracle.forecast.calibration import calibrate
from loracle.forecast.devices import this_device
from loracle.forecast.op_costs import Rates
from loracle.forecast.trace import synthetic_examples
from loracle.model.base import FrozenBase
from loracle.model.layers.fast_parts import install_fast_parts
from loracle.placement import ModulePlan
from loracle.text import GIB
from predicted import plan_from, predicted_step
from workload import start_run

PLACEMENTS = (
    "all-linear", "attention", "attention-qv", "feed-forward", "output-projections",
    "first-third", "last-third",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a step keeps its base and activations, and for how many runs at once."""

    packing: str | None = None
    checkpointing: bool = False
    runs: int = 1


WAYS = {
    "16 bits": Way(),
    "16 bits, checkpointing": Way(checkpointing=True),
    "nf4": Way("nf4"),
    "nf4, checkpointing": Way("nf4", checkpointing=True),
    "16 bits, 4 runs": Way(runs=4),
}
BATCHES = {"8 x 204 tokens": [(54, 150)] * 8, "8 x 127 tokens": [(65, 62)] * 8}
_NEW_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these wheels first")
    parser.add_argument("--geometry", default="llama-2-7b", choices=sorted(GEOMETRIES))
    parser.add_argument(
        "--steps", type=int, default=6, help="steps of each, the first two not timed"
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS))
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no row after so many"
    )
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    given = parser.parse_args()
    if given.wheels:
        start_again_with(given.wheels, script=Path(__file__))
    path = dated("plan", this_device().name, folder=str(given.out))
    report = measure(
        given.geometry,
        steps=given.steps,
        ways=given.ways,
        placements=given.placements,
        done=json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else [],
        minutes=given.minutes,
    )
    write_report(path, report)
    print(f"{summary(report)}\nwritten to {path}")
    return 0


def measure(
    geometry: str,
    *,
    steps: int,
    ways: list[str],
    placements: list[str],
    done: Sequence[Row] = (),
    minutes: float = float("inf"),
) -> dict[str, Any]:
    """Returns the rows, and the device and software they were measured on.

    ``done`` are rows of an earlier call, which are kept and not measured again.
    """
    ends_at = time.monotonic() + 60 * minutes
    device = choose_device("auto")
    dtype = choose_dtype("auto", device=device)
    speed = calibrate(say=lambda what: print(f"measuring {what}", file=sys.stderr))
    rates = speed.rates(overlaps=device.type == "cuda")
    rows = list(done)
    known = {(row["way"], row["placement"], row["batch"]) for row in rows}
    for way, placement, batch in itertools.product(ways, placements, BATCHES):
        if (way, placement, batch) in known or time.monotonic() >= ends_at:
            continue
        row = _row(geometry, device, dtype, way, placement, batch, steps, rates)
        print(row, file=sys.stderr)
        rows.append(row)
    return {
        "schema": 1,
        "device": this_device().name,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "geometry": geometry,
        "dtype": dtype_name(dtype),
        "calibration": {**vars(speed)},
        "rows": rows,
    }


def _row(
    geometry: str,
    device: torch.device,
    dtype: torch.dtype,
    named: str,
    placement: str,
    batch: str,
    steps: int,
    rates: Rates,
) -> dict[str, Any]:
    architecture, way = GEOMETRIES[geometry], WAYS[named]
    settings = {
        "lora.placement": placement,
        "quantization": way.packing or "null",
        "train.gradient_checkpointing": str(way.checkpointing).lower(),
    }
    config = load_config(overrides=[f"{key}={value}" for key, value in settings.items()])
    plan = plan_from(architecture, config)
    predicted = predicted_step(
        architecture, config=config, device=this_device(), dtype=dtype, lengths=BATCHES[batch]
    )
    weights = predicted.parts["weights"]
    row: dict[str, Any] = {
        "way": named,
        "placement": placement,
        "batch": batch,
        "trainable_params": plan.trainable_params,
        "predicted_gib": (weights + way.runs * (predicted.peak - weights)) / GIB,
        "predicted_step_s": way.runs * predicted.work.seconds(rates),
    }
    try:
        base = _base(geometry, device, dtype, packing=way.packing)
        return row | _measured(base, plan=plan, config=config, batch=batch, steps=steps, way=way)
    except (torch.OutOfMemoryError, OutOfMemory):
        return row | {"measured_gib": None, "measured_step_s": None, "latency_ms_per_token": None}
    finally:
        base = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _base(
    geometry: str, device: torch.device, dtype: torch.dtype, *, packing: str | None
) -> FrozenBase:
    base = random_base(geometry, device=device, dtype=dtype, packing=packing)
    install_fast_parts(base.model)
    return base


def _measured(
    base: FrozenBase, *, plan: ModulePlan, config: Config, batch: str, steps: int, way: Way
) -> dict[str, Any]:
    train = config.train.model_copy(update={"max_steps": steps})
    config = config.model_copy(update={"train": train})
    examples = synthetic_examples(BATCHES[batch])
    names = ["default", *map(str, range(1, way.runs))]
    runs = [
        start_run(base, config=config, plan=plan, examples=examples, name=name) for name in names
    ]
    trained = train_bundle(
        base,
        runs,
        micro_batch_tokens=way.runs * train.micro_batch_tokens,
        checkpointing=way.checkpointing,
    )
    times, peak = [], None
    for step, (record, *_) in enumerate(trained):
        assert record is not None
        if step >= 2:  # the optimizer has its state, and kernels are chosen
            times.append(record.step_time_s)
        if base.device.type == "cuda":
            if step == 1:
                torch.cuda.reset_peak_memory_stats(base.device)
            elif step > 1:
                peak = torch.cuda.max_memory_allocated(base.device) / GIB
    return {
        "measured_gib": peak,
        "measured_step_s": statistics.median(times),
        "latency_ms_per_token": _latency_ms(base),
    }


def _latency_ms(base: FrozenBase) -> float:
    """Returns milliseconds per token of one answer, with the adapter unmerged."""
    times = []
    with base.generating(()):
        answering = Answering(base, [(1,) * 64], adapters=["default"])
        for _ in range(_NEW_TOKENS):
            synchronize(base.device)
            started_at = time.perf_counter()
            answering.forward()
            synchronize(base.device)
            times.append(time.perf_counter() - started_at)
    return 1e3 * statistics.median(times[4:])


def summary(report: dict[str, Any]) -> str:
    """Returns the prediction errors in words."""
    lines = [f"{report['geometry']} on {report['device']}, {report['date']}"]
    for what in ("gib", "step_s"):
        errors = [
            abs(row[f"predicted_{what}"] - row[f"measured_{what}"]) / row[f"measured_{what}"]
            for row in report["rows"]
            if row[f"measured_{what}"] is not None
        ]
        if errors:
            lines.append(
                f"{what}: median error {100 * statistics.median(errors):.1f} %, at most "
                f"{100 * max(errors):.1f} % of {len(errors)}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
