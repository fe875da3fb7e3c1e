"""The training loop. There is one, written for a bundle of runs that share a frozen base.

In each step every run brings its next examples; all of them are laid end to end in packed rows, the
base's products serve them together, and each run has its own adapter, masks, loss denominator,
clip, schedule, scaler and optimizer. A single run is a bundle of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from loracle.config import TrainConfig
from loracle.data import Example
from loracle.data.packing import batches_by_tokens, pack
from loracle.device import synchronize
from loracle.errors import NonFiniteError
from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.model.dropout import DropoutStream, threshold_of
from loracle.model.lora import Route
from loracle.schedule import DataOrder, learning_rate

# source: torch.amp.GradScaler; below this an fp16 run has no gradient left to scale
_SMALLEST_LOSS_SCALE = 1.0


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step of one run was."""

    step: int
    """Steps done, this one included."""
    epoch: float
    """Passes over the training set done."""
    loss_nats_per_token: float
    """Over all target tokens of the step's examples, before the update."""
    learning_rate: float
    grad_norm: float | None
    """L2 norm over the adapter before clipping; null: fp16 overflow, the update was skipped."""
    num_tokens: int
    """Real tokens; there is no padding."""
    num_targets: int
    """Target tokens."""
    step_time_s: float
    """Wall time of the whole bundle's step, device synchronised."""


@dataclass
class TrainingRun:
    """One member of a bundle: everything of a run that changes while it trains."""

    adapter: Adapter
    order: DataOrder[Example]
    train: TrainConfig
    dropout: float
    seed: int
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    step: int = 0
    """Optimizer steps done."""

    @property
    def is_done(self) -> bool:
        """True when every step has been taken."""
        return self.step >= self.train.max_steps

    def route(self, *, slots: Sequence[int], lengths: Sequence[int], start: int) -> Route:
        """Returns the route of these sequences of the run's batch, from ``start`` in the row."""
        stream = DropoutStream(
            threshold_of(self.dropout), self.seed, self.step, tuple(slots), tuple(lengths)
        )
        dropout = stream if stream.threshold else None
        return Route(self.adapter.name, start, start + sum(lengths), dropout)


def new_run(
    base: FrozenBase,
    *,
    adapter: Adapter,
    examples: Sequence[Example],
    train: TrainConfig,
    dropout: float,
    seed: int,
) -> TrainingRun:
    """Returns a run at step 0: AdamW over the adapter, the data order of its seed."""
    optimizer = torch.optim.AdamW(
        adapter.parameters.values(),
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        weight_decay=train.weight_decay,
        fused=True,
    )
    scaled = base.dtype == torch.float16
    return TrainingRun(
        adapter=adapter,
        order=DataOrder(examples, batch_size=train.batch_size, seed=seed),
        train=train,
        dropout=dropout,
        seed=seed,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(base.device.type, enabled=scaled),
    )


def train_bundle(
    base: FrozenBase, runs: Sequence[TrainingRun], *, micro_batch_tokens: int
) -> Iterator[list[StepRecord | None]]:
    """Takes one optimizer step of every unfinished run at a time, until all are finished.

    Args:
        base: The frozen model that holds the runs' adapters.
        runs: The bundle.
        micro_batch_tokens: Tokens per forward pass; changes memory, nothing else.

    Yields:
        One record per run, in the bundle's order; None for a run that had finished.

    Raises:
        NonFiniteError: If a loss or gradient is NaN or infinite; says which and where.
    """
    while active := [run for run in runs if not run.is_done]:
        began = time.perf_counter()
        items = [
            _Item(run, slot, example)
            for run in active
            for slot, example in enumerate(run.order.batch(run.step))
        ]
        losses = _accumulate_gradients(base, items, micro_batch_tokens=micro_batch_tokens)
        norms = {id(run): _update(run) for run in active}
        synchronize(base.device)
        elapsed = time.perf_counter() - began
        yield [
            _record(run, items=items, losses=losses, norm=norms[id(run)], elapsed=elapsed)
            if id(run) in norms
            else None
            for run in runs
        ]


@dataclass(frozen=True)
class _Item:
    """One example of one run in one step."""

    run: TrainingRun
    slot: int
    example: Example


def _accumulate_gradients(
    base: FrozenBase, items: Sequence[_Item], *, micro_batch_tokens: int
) -> dict[int, float]:
    """Adds the gradient of every run's mean loss, and returns the losses by ``id(run)``."""
    denominators: dict[int, int] = {}
    for item in items:
        key = id(item.run)
        denominators[key] = denominators.get(key, 0) + item.example.num_targets
    sums = dict.fromkeys(denominators, 0.0)
    lengths = [item.example.num_tokens for item in items]
    for batch in batches_by_tokens(lengths, budget=micro_batch_tokens):
        part = [items[index] for index in batch]
        row = pack([item.example for item in part], device=base.device)
        nll = base.token_nll(row, routes=_routes(part))
        per_sequence = nll.split(row.num_targets)
        total = nll.new_zeros(())
        for item, tokens in zip(part, per_sequence, strict=True):
            share = tokens.sum()
            total = total + item.run.scaler.scale(share / denominators[id(item.run)])
        total.backward()
        for item, value in zip(part, _sums(per_sequence), strict=True):
            _require_finite(value, item=item)
            sums[id(item.run)] += value
    return {key: sums[key] / denominators[key] for key in sums}


def _routes(part: Sequence[_Item]) -> list[Route]:
    """Returns one route per run for items that stand run by run in the row."""
    routes, start = [], 0
    for _, group in groupby(part, key=lambda item: id(item.run)):
        mine = list(group)
        lengths = [item.example.num_tokens for item in mine]
        routes.append(
            mine[0].run.route(slots=[item.slot for item in mine], lengths=lengths, start=start)
        )
        start += sum(lengths)
    return routes


def _sums(parts: Sequence[Tensor]) -> list[float]:
    """Returns the sum of each part in fp64, with one wait for the device."""
    return torch.stack([part.detach().double().sum() for part in parts]).tolist()


def _require_finite(value: float, *, item: _Item) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"step {item.run.step + 1}: the loss of adapter '{item.run.adapter.name}' is {value} "
            f"on record {item.example.record.row}; lower train.learning_rate (now "
            f"{item.run.train.learning_rate:g}) or use dtype float32"
        )


def _update(run: TrainingRun) -> float | None:
    """Clips and applies the run's gradient; returns its norm, None if fp16 skipped the update."""
    rate = learning_rate(run.step, train=run.train)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.scaler.unscale_(run.optimizer)
    parameters = list(run.adapter.parameters.values())
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = total.item()
    # Before clipping, which would spread a NaN to every tensor.
    if not math.isfinite(norm) and not _may_skip(run):
        raise NonFiniteError(_where_gradient_broke(run, norm=norm))
    if run.train.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.train.max_grad_norm, total)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return norm if math.isfinite(norm) else None


def _may_skip(run: TrainingRun) -> bool:
    return run.scaler.is_enabled() and run.scaler.get_scale() > _SMALLEST_LOSS_SCALE


def _where_gradient_broke(run: TrainingRun, *, norm: float) -> str:
    broken = [
        name
        for name, parameter in run.adapter.parameters.items()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    where = f"{len(broken)} tensors, first {broken[0]}" if broken else "their sum of squares"
    return (
        f"step {run.step + 1}: the gradient norm of adapter '{run.adapter.name}' is {norm} "
        f"({where}); lower train.learning_rate (now {run.train.learning_rate:g}) "
        "or use dtype float32"
    )


def _record(
    run: TrainingRun,
    *,
    items: Sequence[_Item],
    losses: dict[int, float],
    norm: float | None,
    elapsed: float,
) -> StepRecord:
    mine = [item.example for item in items if item.run is run]
    return StepRecord(
        step=run.step,
        epoch=run.step / run.order.steps_per_epoch,
        loss_nats_per_token=losses[id(run)],
        learning_rate=learning_rate(run.step - 1, train=run.train),
        grad_norm=norm,
        num_tokens=sum(example.num_tokens for example in mine),
        num_targets=sum(example.num_targets for example in mine),
        step_time_s=elapsed,
    )


def capture_state(run: TrainingRun) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the plain data from which ``restore_state`` continues exactly.

    Random streams, schedule and position in the data are functions of seed and step, so the step
    is all that is kept of them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in run.adapter.parameters.items():
        tensors[f"adapter/{name}"] = parameter.detach()
        for key, value in run.optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = value
    return tensors, {"step": run.step, "scaler": run.scaler.state_dict()}


def restore_state(run: TrainingRun, *, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Puts a run back to the step whose state was captured."""
    for name, parameter in run.adapter.parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"adapter/{name}"])
        moments = (f"optimizer/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq"))
        run.optimizer.state[parameter] = {
            key.split("/")[1]: tensors[key].to(parameter.device, copy=True)
            for key in moments
            if key in tensors
        }
    run.step = state["step"]
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
