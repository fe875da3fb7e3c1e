"""The training loop. There is one, written for a bundle of runs that share a frozen base.

In each step every run brings its next examples; all of them are laid end to end in packed rows, the
base's products serve them together, and each run has its own adapter, masks, loss denominator,
clip, schedule, scaler and optimizer. A single run is a bundle of one. What the step found comes
from the device once, between the gradients and the updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from loracle.engine.device import synchronize
from loracle.engine.gradients import Gradient, fault_of, gradients_of
from loracle.engine.out_of_memory import Halved, PassBudget, say_nothing
from loracle.engine.schedule import learning_rate
from loracle.engine.train_state import TrainState
from loracle.errors import NonFiniteError
from loracle.model.base import FrozenBase
from loracle.model.live_bytes import computing
from loracle.model.trunk import TrunkStore


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


def train_bundle(
    base: FrozenBase,
    runs: Sequence[TrainState],
    *,
    micro_batch_tokens: int,
    trunk: TrunkStore | None = None,
    checkpointing: bool = False,
    halved: Halved = say_nothing,
) -> Iterator[list[StepRecord | None]]:
    """Takes one optimizer step of every active run at a time, until none is left.

    A run of several that breaks gets a ``failure`` and is left out; the step is taken again without
    it, so that nothing of it reaches the others. When memory runs out, passes are halved from then
    on, and the step is taken again.

    Args:
        base: The frozen model that holds the runs' adapters.
        runs: The bundle.
        micro_batch_tokens: Tokens per forward pass; changes memory, nothing else.
        trunk: Where hidden states below the lowest adapter of the active runs come from. None:
            they are computed in every pass.
        checkpointing: Activations inside decoder layers are computed again for the gradient;
            changes memory and time, nothing else.
        halved: Told when passes are halved.

    Yields:
        One record per run, in the bundle's order; None for a run that had finished or failed.

    Raises:
        NonFiniteError: If a loss or gradient of a single run is NaN or infinite; says which and
            where.
        OutOfMemory: If the longest example does not fit by itself.
    """
    passes = PassBudget(micro_batch_tokens, halved=halved)
    while active := [run for run in runs if run.is_active]:
        began = time.perf_counter()
        gradients = _finite_gradients(
            base, active, passes=passes, trunk=trunk, checkpointing=checkpointing, runs=runs
        )
        for gradient in gradients:
            _update(gradient)
        synchronize(base.device)
        elapsed = time.perf_counter() - began
        records = {id(each.run): _record(each, elapsed=elapsed) for each in gradients}
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
    """Returns the gradients of all runs that have one, after setting the others' ``failure``."""
    while active:
        found = _gradients_that_fit(
            base, active, passes=passes, trunk=trunk, checkpointing=checkpointing
        )
        for gradient in found:
            gradient.run.failure = fault_of(gradient)
        faults = [run.failure for run in active if run.failure is not None]
        if not faults:
            return found
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
    """Clips and applies a run's gradient; a scaler leaves an overflow out, on the device."""
    run = gradient.run
    rate = learning_rate(run.step, train=run.train)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.scaler.unscale_(run.optimizer)
    if run.train.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(
            list(run.adapter.parameters.values()), run.train.max_grad_norm, gradient.norm
        )
    with computing("optimizer"):
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1


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
