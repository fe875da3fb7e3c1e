"""Predicted against measured on a GPU: memory, step time and latency, with random weights.

    python benchmarks/gpu_plan.py [--wheels DIR] [--geometry llama-2-7b] [--steps 6]

For each base (16 bits, NF4) and each placement: what `loracle plan` says of a step, and what
``max_memory_allocated`` and the clock say of it. The device's speed is measured first, as ``loracle
doctor --calibrate`` does. Writes ``results/gpu/plan-<date>-<device>.json``. On a machine without a
GPU it runs too, at ``--geometry tiny``, and measures no memory.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from geometry import GEOMETRIES, random_base
from gpu import start_again_with
from loracle.config.files import load_config
from loracle.config.run import Config
from loracle.engine.decode import Answering
from loracle.engine.device import choose_device, choose_dtype, dtype_name, synchronize
from loracle.engine.train import train_bundle
from loracle.engine.train_state import new_run
from loracle.forecast.calibration import calibrate
from loracle.forecast.devices import this_device
from loracle.forecast.meta_base import model_without_weights
from loracle.forecast.op_costs import Rates
from loracle.forecast.predict import GRANULE
from loracle.forecast.trace import Trace, synthetic_examples, trace_step
from loracle.model.adapters import attach_adapter
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_from_architecture
from loracle.model.layers.four_bit import install_unpacked_products
from loracle.model.layers.norm import install_fast_norms
from loracle.placement import ModulePlan, resolve_placement
from loracle.records.files import strict_json

PLACEMENTS = (
    "all-linear", "attention", "attention-qv", "feed-forward", "output-projections",
    "first-third", "last-third",
)  # fmt: skip
BATCHES = {"8 x 204 tokens": [(54, 150)] * 8, "8 x 127 tokens": [(65, 62)] * 8}
_NEW_TOKENS = 32
_GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these wheels first")
    parser.add_argument("--geometry", default="llama-2-7b", choices=sorted(GEOMETRIES))
    parser.add_argument("--steps", type=int, default=6, help="steps of each, the first two apart")
    parser.add_argument("--packings", nargs="+", default=["none", "nf4"])
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS))
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    given = parser.parse_args()
    if given.wheels:
        start_again_with(given.wheels, script=Path(__file__))
    found = measure(
        given.geometry,
        steps=given.steps,
        packings=[None if name == "none" else name for name in given.packings],
        placements=given.placements,
    )
    slug = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    path = given.out / f"plan-{found['date'].replace('-', '')}-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(strict_json(found, origin=path.name, indent=1) + "\n", encoding="utf-8")
    print(summary(found))
    print(f"kept in {path}")
    return 0


def measure(
    geometry: str, *, steps: int, packings: list[str | None], placements: list[str]
) -> dict[str, Any]:
    """Returns the rows, and what they were measured on."""
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
    config = load_config(overrides=[f"lora.placement={placement}"])
    lora = config.lora
    inventory = inventory_from_architecture(GEOMETRIES[geometry])
    plan = resolve_placement(placement, inventory=inventory, rank=lora.rank, alpha=lora.alpha)
    traced = _traced(geometry, dtype, packing=packing, plan=plan, config=config, batch=batch)
    row: dict[str, Any] = {
        "packing": packing,
        "placement": placement,
        "batch": batch,
        "trainable_params": plan.trainable_params,
        "predicted_gib": traced.peak / _GIB,
        "predicted_step_s": traced.work.seconds(rates),
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


def _traced(
    geometry: str,
    dtype: torch.dtype,
    *,
    packing: str | None,
    plan: ModulePlan,
    config: Config,
    batch: str,
) -> Trace:
    here = this_device()
    with model_without_weights(
        GEOMETRIES[geometry],
        plan=plan,
        device=here,
        dtype=dtype,
        dropout=config.lora.dropout,
        quantization=packing,
    ) as (base, adapter):
        return trace_step(
            base,
            adapter=adapter,
            config=config,
            examples=synthetic_examples(BATCHES[batch]),
            granule=GRANULE if here.is_gpu else 1,
        )


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
    adapter = attach_adapter(
        base, name="default", plan=plan, dropout=config.lora.dropout, seed=0, model_source="random"
    )
    run = new_run(
        base,
        adapter=adapter,
        examples=synthetic_examples(BATCHES[batch]),
        train=config.train.model_copy(update={"max_steps": steps}),
        dropout=config.lora.dropout,
        seed=0,
    )
    times, peak = [], None
    for step, (record,) in enumerate(
        train_bundle(base, [run], micro_batch_tokens=config.train.micro_batch_tokens)
    ):
        assert record is not None
        if step >= 2:  # the optimizer has its state, and kernels are chosen
            times.append(record.step_time_s)
        if base.device.type == "cuda":
            if step == 1:
                torch.cuda.reset_peak_memory_stats(base.device)
            elif step > 1:
                peak = torch.cuda.max_memory_allocated(base.device) / _GIB
    return {
        "measured_gib": peak,
        "measured_step_s": statistics.median(times),
        "latency_ms_per_token": _latency_ms(base),
    }


def _latency_ms(base: FrozenBase) -> float:
    """Returns milliseconds for one more token of one answer, the adapter unmerged."""
    times = []
    with base.generating(()):
        answering = Answering(base, [(1,) * 64], adapters=["default"])
        for _ in range(_NEW_TOKENS):
            synchronize(base.device)
            began = time.perf_counter()
            answering.forward()
            synchronize(base.device)
            times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[4:])


def summary(found: dict[str, Any]) -> str:
    """Returns the errors in words."""
    lines = [f"{found['geometry']} on {found['device']}, {found['date']}"]
    for what in ("gib", "step_s"):
        errors = [
            abs(row[f"predicted_{what}"] - row[f"measured_{what}"]) / row[f"measured_{what}"]
            for row in found["rows"]
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
