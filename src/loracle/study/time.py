"""How long a study will take, before it starts: rough, and corrected by runs that are finished.

Counted are the matrix products of training, scoring and answering; how fast the device does them is
tried out in a second. What lies between them comes from one machine, so without finished runs the
figure may be wrong by a factor of two, and is printed as rough.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loracle.config.run import Config
from loracle.forecast.lengths import DataShape, data_shape
from loracle.placement import Inventory, ModulePlan
from loracle.records.files import read_json
from loracle.study.plan import PlannedArm, PlannedRun, StudyPlan
from loracle.study.search import search_runs
from loracle.text import in_words, plural

# measured (2-core CPU, SmolLM2-135M, bf16, LOG.md): the frozen products' part of a step's time.
_PRODUCTS_FRAC = 0.49


# measured (the same): of the time of decoding, where each product is small.
_DECODING_FRAC = 0.25


_FLOPS_PER_PARAM = 2


Rate = Callable[[int], float]
"""FLOP per second of products over so many rows."""


@dataclass(frozen=True)
class TimeEstimate:
    """What is left of a study."""

    seconds_by_arm: Mapping[str, float]
    """Of one run of each arm, from its start to its result."""
    seconds_left: float
    """Of all runs that are not finished, one after another."""
    num_left: int
    """Those runs."""
    basis: str
    """What it rests on, for a person."""

    def words(self) -> str:
        """Returns it in a line."""
        if not self.num_left:
            return "nothing left to run"
        return (
            f"about {in_words(self.seconds_left)} for {plural(self.num_left, 'run')} one after "
            f"another ({self.basis})"
        )


def estimate_time(plan: StudyPlan, *, out: Path) -> TimeEstimate:
    """Returns how long the runs of a study that are not finished will take.

    Args:
        plan: The study.
        out: Its folder; runs in it that are finished correct the estimate.

    Raises:
        UsageError: If the data or the device cannot be used.
    """
    shape = data_shape(plan.base)
    rate, peak_gflops = probed_rate(plan)
    rough = {
        arm.name: run_seconds(plan.base, arm=arm, inventory=plan.inventory, shape=shape, rate=rate)
        for arm in plan.arms
    }
    runs = [*search_runs(plan), *plan.runs]
    pace = _pace(runs, out=out, rough=rough)
    factor = statistics.median(pace) if pace else 1.0
    seconds = {name: factor * each for name, each in rough.items()}
    left = [run.arm for run in runs if not _result(run, out=out).is_file()]
    basis = (
        f"at the pace of {plural(len(pace), 'finished run')}"
        if pace
        else f"rough: the device multiplies at {peak_gflops:,.0f} GFLOP/s"
    )
    return TimeEstimate(seconds, sum(seconds[arm] for arm in left), len(left), basis)


def _result(run: PlannedRun, *, out: Path) -> Path:
    return out / "runs" / run.id / "result.json"


def _pace(runs: Sequence[PlannedRun], *, out: Path, rough: Mapping[str, float]) -> list[float]:
    """Returns measured over estimated time of each finished run."""
    found = []
    for run in runs:
        path = _result(run, out=out)
        if path.is_file():
            began = read_json(path.parent / "environment.json")["captured_at"]
            ended = read_json(path)["finished_at"]
            elapsed = datetime.fromisoformat(ended) - datetime.fromisoformat(began)
            found.append(elapsed.total_seconds() / rough[run.arm])
    return found


def probed_rate(plan: StudyPlan) -> tuple[Rate, float]:
    """Returns the device's rate by rows, tried out on the model's largest kind, and the best."""
    import torch

    from loracle.engine.device import choose_device, choose_dtype
    from loracle.engine.throughput import token_rates

    device = choose_device(plan.base.device)
    dtype = choose_dtype(plan.base.dtype, device=device)
    inner = [module for module in plan.inventory.modules if module.role != "head"]
    largest = max(inner, key=lambda module: module.in_features * module.out_features)
    weight = torch.ones(largest.out_features, largest.in_features, dtype=dtype, device=device)
    rows = sorted({1, plan.base.eval.generate_batch_size, plan.base.train.micro_batch_tokens})
    flops = {
        count: _FLOPS_PER_PARAM * weight.numel() * tokens_per_s
        for count, tokens_per_s in token_rates(weight, counts=rows)
    }
    nearest = {count: flops[count] for count in rows if count in flops}

    def rate(count: int) -> float:
        return nearest[max((known for known in nearest if known <= count), default=min(nearest))]

    return rate, max(flops.values()) / 1e9


def run_seconds(
    config: Config, *, arm: PlannedArm, inventory: Inventory, shape: DataShape, rate: Rate
) -> float:
    """Returns the seconds of a run alone: training, validations, answers, latency and audit.

    What the untuned base is asked for is left out: a study asks it once.
    """
    train, many = config.train, config.train.micro_batch_tokens
    forward = forward_flops(inventory, tokens=shape.tokens, targets=shape.targets)
    step = train.batch_size * (forward + backward_flops(arm.plan, inventory=inventory, shape=shape))
    every = config.eval.every_steps
    validations = 1 + ((train.max_steps - 1) // every if every else 0)
    scored = validations * shape.num_validation + config.audit.reload_examples
    products = train.max_steps * step + scored * forward
    return products / rate(many) / _PRODUCTS_FRAC + decoding_seconds(
        config, inventory=inventory, rate=rate
    )


def forward_flops(inventory: Inventory, *, tokens: float, targets: float) -> float:
    """Returns the products of a forward pass over an example; the head sees targets only."""
    return _FLOPS_PER_PARAM * (
        tokens * _params(inventory, head=False) + targets * _params(inventory, head=True)
    )


def backward_flops(plan: ModulePlan, *, inventory: Inventory, shape: DataShape) -> float:
    """Returns the products of a backward pass over an example.

    Gradients of activations reach down to the lowest adapted layer; gradients of weights are those
    of the adapters, or of the model in full fine-tuning.
    """
    forward = forward_flops(inventory, tokens=shape.tokens, targets=shape.targets)
    if plan.is_full:
        return 2 * forward
    lowest = inventory.num_layers if plan.lowest_layer is None else plan.lowest_layer
    frozen = sum(
        module.in_features * module.out_features
        for module in inventory.modules
        if module.role != "head" and (module.layer or 0) < lowest
    )
    adapters = 3 * _FLOPS_PER_PARAM * shape.tokens * plan.trainable_params
    return forward - _FLOPS_PER_PARAM * shape.tokens * frozen + adapters


def decoding_seconds(config: Config, *, inventory: Inventory, rate: Rate) -> float:
    """Returns the seconds of the answers, each as long as allowed, and of the latency trials."""
    evaluate, measure = config.eval, config.measure
    flops = _FLOPS_PER_PARAM * (_params(inventory, head=False) + _params(inventory, head=True))
    answered = evaluate.generate_examples * evaluate.max_new_tokens
    trials = 3 * measure.latency_trials * measure.latency_new_tokens
    each = [(answered, rate(evaluate.generate_batch_size)), (trials, rate(1))]
    return sum(tokens * flops / speed for tokens, speed in each) / _DECODING_FRAC


def _params(inventory: Inventory, *, head: bool) -> int:
    return sum(
        module.in_features * module.out_features
        for module in inventory.modules
        if (module.role == "head") == head
    )
