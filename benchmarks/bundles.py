"""Steps of a bundle on random weights: the block of the scaling and GPU benchmarks."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace

import loracle
from figures import Row, block_of, counted, step_figures
from floor import base_products, flops_of, head_products, lora_products
from geometry import random_base, random_examples
from loracle.engine.device import keep_large_blocks
from loracle.engine.train_state import TrainState
from loracle.model.base import FrozenBase
from loracle.model.layers.fast_parts import install_fast_parts
from loracle.model.trunk import TrunkStore
from loracle.placement import ModulePlan
from loracle.runner.bundle_size import bundle_budget
from workload import config_of, plan_of, start_run

# assumed: more than the hidden states of any point need
_TRUNK_BYTES = 8 << 30


@dataclass(frozen=True)
class Point:
    """One setting to measure."""

    geometry: str
    runs: int = 1
    """Number of runs that train together."""
    batch: int = 8
    """Examples per step of one run."""
    length: int | None = None
    """Tokens of every example; None: distributed as in Alpaca."""
    placement: str = "all-linear"
    trunk: bool = False
    """Whether the hidden states below the lowest adapter are cached."""
    steps: int = 2
    """Steps after the warm-up."""
    epochs: int = 1
    """With 2, the first pass over the examples is the warm-up, and fills the trunk's store."""
    device: str = "auto"
    dtype: str = "auto"
    packing: str | None = None
    """``nf4``: the base is packed in 4 bits."""
    checkpointing: bool = False
    """Whether activations are computed again for the gradient."""


def measure_point(point: Point) -> Row:
    """Returns the steps, rates and peak of a point, in a process of its own."""
    warm_ups = 1 if point.epochs == 1 else point.steps
    config = config_of(
        f"train.max_steps={warm_ups + point.steps}", f"train.batch_size={point.batch}"
    )
    keep_large_blocks()
    device = loracle.choose_device(point.device)
    dtype = loracle.choose_dtype(point.dtype, device=device)
    base = random_base(point.geometry, device=device, dtype=dtype, packing=point.packing)
    install_fast_parts(base.model)
    everything = plan_of(base.model, config, "all-linear")
    plan = plan_of(base.model, config, point.placement)
    runs = [_run(base, point, plan=plan, config=config, seed=seed) for seed in range(point.runs)]
    store = None
    if point.trunk:
        store = TrunkStore(base, memory_bytes=_TRUNK_BYTES)
    budget = bundle_budget([config.train.micro_batch_tokens] * point.runs, device_type=device.type)
    steps = loracle.train_bundle(
        base, runs, micro_batch_tokens=budget, trunk=store, checkpointing=point.checkpointing
    )
    rows = [
        {
            "step": index,
            "warm_up": index < warm_ups,
            "step_time_s": records[0].step_time_s,
            "num_tokens": sum(record.num_tokens for record in records),
            "num_targets": sum(record.num_targets for record in records),
            "loss_nats_per_token": [record.loss_nats_per_token for record in records],
        }
        for index, records in enumerate(steps)
    ]
    rows = [row | {"gflop": _gflop(row, base, everything, plan)} for row in rows]
    trunk = {"hits": store.hits, "computed": store.computed} if store else None
    return block_of(rows, device=device, dtype=dtype, point=asdict(point), trunk=trunk)


def _run(
    base: FrozenBase, point: Point, *, plan: ModulePlan, config: loracle.Config, seed: int
) -> TrainState:
    count = point.batch * point.steps
    run = start_run(
        base,
        config=config.model_copy(update={"seed": seed}),
        plan=plan,
        examples=random_examples(point.geometry, count=count, length=point.length, seed=seed),
        name=f"run-{seed}",
    )
    # The same order for all, so that two points differ only in what they state.
    return replace(run, order=replace(run.order, seed=0))


def _gflop(row: Row, base: FrozenBase, everything: ModulePlan, plan: ModulePlan) -> float:
    """Returns the step's products, forward and backward in every layer, adapters included."""
    vocab, hidden = base.model.get_output_embeddings().weight.shape
    tokens = row["num_tokens"]
    products = base_products(everything, tokens=tokens) + lora_products(plan, tokens=tokens)
    return flops_of(products + head_products(vocab, hidden, targets=row["num_targets"])) / 1e9


def point_figures(block: Row) -> Row:
    """Returns the figures of a measured point over its steps after the warm-up."""
    rows = counted(block["rows"])
    if not rows:
        return {"error": block["error"]}
    warm_ups = [row["step_time_s"] for row in block["rows"] if row["warm_up"]]
    times = {"warm_up_s": statistics.median(warm_ups), "peak_gib": block["peak_gib"]}
    return step_figures(rows) | times
