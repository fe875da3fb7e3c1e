"""Steps of a bundle on random weights: the block that scaling and GPU benchmarks are made of."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import loracle
from figures import environment_of, peak_gib, sources_digest
from floor import base_products, flops_of, head_products, lora_products
from geometry import GEOMETRIES, alpaca_like_lengths, random_base, random_examples
from loracle.data import Example
from loracle.engine.device import keep_large_blocks
from loracle.engine.train_state import TrainState
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.model.trunk import TrunkStore
from loracle.placement import ModulePlan
from loracle.runner.bundle_size import bundle_budget

# assumed: more than the states of any point here take
_TRUNK_BYTES = 8 << 30


@dataclass(frozen=True)
class Point:
    """One thing to measure."""

    geometry: str
    runs: int = 1
    """K, the runs that train together."""
    batch: int = 8
    """Examples per step of one run."""
    length: int | None = None
    """Tokens of every example; None: spread as Alpaca's."""
    placement: str = "all-linear"
    trunk: bool = False
    """Keeps the hidden states below the lowest adapter."""
    steps: int = 2
    """Counted steps."""
    epochs: int = 1
    """2: the first pass over the examples is not counted, and fills the trunk's store."""
    device: str = "auto"
    dtype: str = "auto"


def measure_point(point: Point) -> dict[str, Any]:
    """Returns the steps, rates and peak of a point; the process is its own."""
    config = loracle.load_config(
        "base_config",
        overrides=[
            "train.warmup_frac=0.0",
            f"train.max_steps={_uncounted(point) + point.steps}",
            f"train.batch_size={point.batch}",
        ],
    )
    keep_large_blocks()
    device = loracle.choose_device(point.device)
    dtype = loracle.choose_dtype(point.dtype, device=device)
    base = random_base(point.geometry, device=device, dtype=dtype)
    everything, plan = (_plan(base, placement) for placement in ("all-linear", point.placement))
    runs = [_run(base, point, plan=plan, config=config, seed=seed) for seed in range(point.runs)]
    store = None
    if point.trunk:
        store = TrunkStore(
            base, weights_digest=point.geometry, folder=None, memory_bytes=_TRUNK_BYTES
        )
    budget = bundle_budget([config.train.micro_batch_tokens] * point.runs, device_type=device.type)
    steps = loracle.train_bundle(base, runs, micro_batch_tokens=budget, trunk=store)
    rows = [
        {
            "step": index,
            "warm_up": index < _uncounted(point),
            "step_time_s": records[0].step_time_s,
            "num_tokens": sum(record.num_tokens for record in records),
            "num_targets": sum(record.num_targets for record in records),
            "loss_nats_per_token": [record.loss_nats_per_token for record in records],
        }
        for index, records in enumerate(steps)
    ]
    return {
        "error": None,
        "point": asdict(point),
        "rows": [row | {"gflop": _gflop(row, base, everything, plan)} for row in rows],
        "trunk": {"hits": store.hits, "computed": store.computed} if store else None,
        "peak_gib": peak_gib(device),
        "sources": sources_digest(),
        "environment": environment_of(device, dtype),
    }


def _uncounted(point: Point) -> int:
    return 1 if point.epochs == 1 else point.steps


def _plan(base: FrozenBase, placement: str) -> ModulePlan:
    return loracle.resolve_placement(
        placement, inventory=inventory_of(base.model), rank=16, alpha=32
    )


def _run(
    base: FrozenBase, point: Point, *, plan: ModulePlan, config: loracle.Config, seed: int
) -> TrainState:
    adapter = loracle.attach_adapter(
        base,
        name=f"run-{seed}",
        plan=plan,
        dropout=config.lora.dropout,
        seed=seed,
        model_source=point.geometry,
    )
    run = loracle.new_run(
        base,
        adapter=adapter,
        examples=_examples(point, seed=seed),
        train=config.train,
        dropout=config.lora.dropout,
        seed=seed,
    )
    # One order for all: what differs between two points is what they say differs.
    return replace(run, order=replace(run.order, seed=0))


def _examples(point: Point, *, seed: int) -> list[Example]:
    count = point.batch * point.steps
    lengths = [point.length] * count if point.length else alpaca_like_lengths(count, seed=0)
    return random_examples(lengths, vocab=GEOMETRIES[point.geometry]["vocab_size"], seed=seed)


def _gflop(
    row: dict[str, Any], base: FrozenBase, everything: ModulePlan, plan: ModulePlan
) -> float:
    """Returns the step's products, forward and back through every layer, adapters included."""
    vocab, hidden = base.model.get_output_embeddings().weight.shape
    tokens = row["num_tokens"]
    products = base_products(everything, tokens=tokens) + lora_products(plan, tokens=tokens)
    return flops_of(products + head_products(vocab, hidden, targets=row["num_targets"])) / 1e9


def point_figures(block: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a measured point: medians over its counted steps."""
    counted = [row for row in block["rows"] if not row["warm_up"]]
    first = [row for row in block["rows"] if row["warm_up"]]
    if not counted:
        return {"error": block["error"]}
    seconds = [row["step_time_s"] for row in counted]
    return {
        "step_time_s": statistics.median(seconds),
        "warm_up_s": statistics.median(row["step_time_s"] for row in first),
        "tokens_per_s": sum(row["num_tokens"] for row in counted) / sum(seconds),
        "gflop_per_s": sum(row["gflop"] for row in counted) / sum(seconds),
        "peak_gib": block["peak_gib"],
    }
