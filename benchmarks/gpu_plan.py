"""Predicted against measured on a GPU: memory, step time and latency, with random weights.

    python benchmarks/gpu_plan.py [--wheels DIR] [--geometry llama-2-7b] [--steps 6]

For each base (16 bits, NF4) and placement: a step as ``loracle plan`` predicts it, and as
``max_memory_allocated`` and the clock measure it. The device's speed is measured first, as
``loracle doctor --calibrate`` does. Writes ``results/gpu/plan-<date>-<device>.json``. Without a GPU
it runs at ``--geometry tiny`` and measures no memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from figures import dated, write_report
from geometry import GEOMETRIES, random_base
from gpu import start_again_with
from loracle.config.files import load_config
from loracle.config.run import Config
from loracle.engine.decode import Answering
from loracle.engine.device import choose_device, choose_dtype, dtype_name, synchronize
from loracle.engine.train import train_bundle
from loracle.forecast.calibration import calibrate
from loracle.forecast.devices import this_device
from loracle.forecast.op_costs import Rates
from loracle.forecast.trace import synthetic_examples
from loracle.model.base import FrozenBase
from loracle.model.layers.four_bit import install_unpacked_products
from loracle.model.layers.norm import install_fast_norms
from loracle.placement import ModulePlan
from loracle.text import GIB
from predicted import plan_from, predicted_step
from workload import start_run

PLACEMENTS = (
    "all-linear", "attention", "attention-qv", "feed-forward", "output-projections",
    "first-third", "last-third",
)  # fmt: skip
BATCHES = {"8 x 204 tokens": [(54, 150)] * 8, "8 x 127 tokens": [(65, 62)] * 8}
_NEW_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these wheels first")
    parser.add_argument("--geometry", default="llama-2-7b", choices=sorted(GEOMETRIES))
    parser.add_argument(
        "--steps", type=int, default=6, help="steps of each, the first two not timed"
    )
    parser.add_argument("--packings", nargs="+", default=["none", "nf4"])
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS))
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    given = parser.parse_args()
    if given.wheels:
        start_again_with(given.wheels, script=Path(__file__))
    report = measure(
        given.geometry,
        steps=given.steps,
        packings=[None if name == "none" else name for name in given.packings],
        placements=given.placements,
    )
    path = dated("plan", report["device"], folder=str(given.out))
    write_report(path, report)
    print(f"{summary(report)}\nwritten to {path}")
    return 0


def measure(
    geometry: str, *, steps: int, packings: list[str | None], placements: list[str]
) -> dict[str, Any]:
    """Returns the rows, and the device and software they were measured on."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device=device)
    speed = calibrate(say=lambda what: print(f"measuring {what}", file=sys.stderr))
    rates = speed.rates(overlaps=device.type == "cuda")
    rows = []
    for packing in packings:
        for placement in placements:
            for batch in BATCHES:
                row = _row(geometry, device, dtype, packing, placement, batch, steps, rates)
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
    packing: str | None,
    placement: str,
    batch: str,
    steps: int,
    rates: Rates,
) -> dict[str, Any]:
    architecture = GEOMETRIES[geometry]
    quantization = f"quantization={packing or 'null'}"
    config = load_config(overrides=[f"lora.placement={placement}", quantization])
    plan = plan_from(architecture, config)
    predicted = predicted_step(
        architecture, config=config, device=this_device(), dtype=dtype, lengths=BATCHES[batch]
    )
    row: dict[str, Any] = {
        "packing": packing,
        "placement": placement,
        "batch": batch,
        "trainable_params": plan.trainable_params,
        "predicted_gib": predicted.peak / GIB,
        "predicted_step_s": predicted.work.seconds(rates),
    }
    base = _base(geometry, device, dtype, packing=packing)
    try:
        return row | _measured(base, plan=plan, config=config, batch=batch, steps=steps)
    except torch.OutOfMemoryError:
        return row | {"measured_gib": None, "measured_step_s": None, "latency_ms_per_token": None}
    finally:
        del base
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _base(
    geometry: str, device: torch.device, dtype: torch.dtype, *, packing: str | None
) -> FrozenBase:
    base = random_base(geometry, device=device, dtype=dtype)
    install_fast_norms(base.model)
    if packing:
        pack_in_place(base)
    return base


def pack_in_place(base: FrozenBase) -> None:
    """Packs every linear layer but the head, as loading in 4 bits does."""
    from bitsandbytes.functional import quantize_4bit

    head = base.model.get_output_embeddings()
    for module in base.model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed, state = quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True
            )
            weight: Any = torch.nn.Parameter(packed, requires_grad=False)
            weight.quant_state = state
            module.weight = weight
    install_unpacked_products(base.model)
    base.quantization = "nf4"


def _measured(
    base: FrozenBase, *, plan: ModulePlan, config: Config, batch: str, steps: int
) -> dict[str, Any]:
    train = config.train.model_copy(update={"max_steps": steps})
    config = config.model_copy(update={"train": train})
    run = start_run(base, config=config, plan=plan, examples=synthetic_examples(BATCHES[batch]))
    times, peak = [], None
    for step, (record,) in enumerate(
        train_bundle(base, [run], micro_batch_tokens=train.micro_batch_tokens)
    ):
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
