"""The only training loop: it trains a bundle of runs that share a frozen base.

In each step the next examples of all runs are packed into rows, so that the base's products serve
them together. Each run has its own adapter, masks, loss denominator, clip, schedule, scaler and
optimizer. A single run is a bundle of one. Losses and norms are copied from the device once per
step, between the gradients and the updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from loracle.engine.device import synchronize
from loracle.engine.gradients import Gradient, fault_of, gradients_of
from loracle.engine.out_of_memory import Halved, PassBudget, say_nothing, twice
from loracle.engine.schedule import learning_rate
from loracle.engine.train_state import TrainState
from loracle.errors import NonFiniteError
from loracle.model.base import FrozenBase
from loracle.model.live_bytes import computing
from loracle.model.trunk import TrunkStore


@dataclass(frozen=True)
class StepRecord:
    """The measurements of one optimizer step of one run."""

    step: int
    """Steps so far, this one included."""
    epoch: float
    """Passes over the training set so far."""
    loss_nats_per_token: float
    """Mean over all target tokens of the step's examples, before the update."""
    learning_rate: float
    grad_norm: float | None
    """L2 norm over the adapter before clipping; null: fp16 overflow, the update was skipped."""
    num_tokens: int
    """Tokens; there is no padding."""
    num_targets: int
    """Target tokens."""
    step_time_s: float
    """Wall time of the whole bundle's step, device synchronised."""


def train_bundle(
    base: FrozenBase,
    runs: Sequence[TrainState],
    *,
    micro_batch_tokens: int,
    trunk: TrunkStore | None = None,
    checkpointing: bool = False,
    halved: Halved = say_nothing,
) -> Iterator[list[StepRecord | None]]:
    """Takes optimizer steps of all active runs together, until none is active.

    If one of several runs breaks, its ``failure`` is set and the step is repeated without it, so
    that it does not affect the others. When memory runs out, passes are halved from then on and the
    step is repeated.

    Args:
        base: The frozen model that holds the runs' adapters.
        runs: The bundle.
        micro_batch_tokens: Tokens per forward pass; changes memory, nothing else.
        trunk: Source of the hidden states below the lowest adapter of the active runs. None: they
            are computed in every pass.
        checkpointing: Activations inside decoder layers are recomputed for the gradient; changes
            memory and time, nothing else.
        halved: Called when passes are halved.

    Yields:
        One record per run, in the bundle's order; None for a run that had finished or failed.

    Raises:
        NonFiniteError: If a loss or gradient of a single run is NaN or infinite.
        OutOfMemory: If the longest example does not fit by itself.
    """
    passes = PassBudget(micro_batch_tokens, halved=halved)
    while active := [run for run in runs if run.is_active]:
        started_at = time.perf_counter()
        gradients = _finite_gradients(
            base, active, passes=passes, trunk=trunk, checkpointing=checkpointing, runs=runs
        )
        for gradient in gradients:
            _update(gradient)
        synchronize(base.device)
        elapsed = time.perf_counter() - started_at
        records = {id(g.run): _record(g, elapsed=elapsed) for g in gradients}
        yield [records.get(id(run)) for run in runs]


def _finite_gradients(
    base: FrozenBase,
    active: Sequence[TrainState],
    *,
    passes: PassBudget,
    trunk: TrunkStore | None,
    checkpointing: bool,
    runs: Sequence[TrainState],
) -> list[Gradient]:
    """Returns the gradients of all sound runs, after setting the ``failure`` of the others."""
    while active:
        gradients = _gradients_that_fit(
            base, active, passes=passes, trunk=trunk, checkpointing=checkpointing
        )
        for gradient in gradients:
            gradient.run.failure = fault_of(gradient)
        faults = [run.failure for run in active if run.failure is not None]
        if not faults:
            return gradients
        _drop_gradients(active)
        if len(runs) == 1:
            raise NonFiniteError(faults[0])
        active = [run for run in active if run.failure is None]
    return []


def _gradients_that_fit(
    base: FrozenBase,
    active: Sequence[TrainState],
    *,
    passes: PassBudget,
    trunk: TrunkStore | None,
    checkpointing: bool,
) -> list[Gradient]:
    return passes.fit(
        lambda tokens: gradients_of(
            base, active, micro_batch_tokens=tokens, trunk=trunk, checkpointing=checkpointing
        ),
        lengths=[example.num_tokens for run in active for example in run.order.batch(run.step)],
        undo=lambda: _drop_gradients(active),
        where=f"step {active[0].step + 1}",
    )


def _drop_gradients(runs: Sequence[TrainState]) -> None:
    for run in runs:
        run.optimizer.zero_grad(set_to_none=True)


def _update(gradient: Gradient) -> None:
    """Clips and applies a run's gradient; a scaler skips an overflow on the device."""
    run = gradient.run
    rate = learning_rate(run.step, train=run.train)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    for part in (_unscale, _clip, _apply):
        where = f"step {run.step + 1}"
        twice(partial(part, gradient), undo=run.drop_partial_moments, where=where)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1


# What each of these allocates it allocates first: after a failure nothing has been changed.
def _unscale(gradient: Gradient) -> None:
    gradient.run.scaler.unscale_(gradient.run.optimizer)


def _clip(gradient: Gradient) -> None:
    run = gradient.run
    if run.train.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(
            list(run.adapter.parameters.values()), run.train.max_grad_norm, gradient.norm
        )


def _apply(gradient: Gradient) -> None:
    with computing("optimizer"):
        gradient.run.scaler.step(gradient.run.optimizer)


def _record(gradient: Gradient, *, elapsed: float) -> StepRecord:
    run, norm = gradient.run, gradient.norm_value
    return StepRecord(
        step=run.step,
        epoch=run.step / run.order.steps_per_epoch,
        loss_nats_per_token=gradient.nll_sum_nats / gradient.num_targets,
        learning_rate=learning_rate(run.step - 1, train=run.train),
        grad_norm=norm if math.isfinite(norm) else None,
        num_tokens=sum(example.num_tokens for example in gradient.examples),
        num_targets=gradient.num_targets,
        step_time_s=elapsed,
    )
