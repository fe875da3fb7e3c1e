"""The gradients of a bundle: every run's examples through the shared base, in packed rows.

The host waits for the device once, when all rows are done: it then learns each run's loss and
gradient norm, and from them whether the gradient can be used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from loracle.data import Example
from loracle.data.packing import batches_by_tokens, pack
from loracle.engine.train_state import TrainState
from loracle.model.base import FrozenBase
from loracle.model.blocks import Trunk
from loracle.model.layers.routing import Route
from loracle.model.trunk import TrunkStore, lowest_layer

# source: torch.amp.GradScaler; below this an fp16 run has no gradient left to scale
_SMALLEST_LOSS_SCALE = 1.0


@dataclass(frozen=True)
class _Item:
    """One example of one run in one step."""

    run: TrainState
    slot: int
    example: Example


@dataclass(frozen=True)
class Gradient:
    """What a step found for one run; the gradient itself is in the adapter, still scaled."""

    run: TrainState
    examples: Sequence[Example]
    nll: Tensor
    """-ln p of every target of the examples, in nats, on the device."""
    norm: Tensor
    """L2 norm before scaling and clipping, on the device."""
    nll_sum_nats: float
    norm_value: float

    @property
    def num_targets(self) -> int:
        """Target tokens of the step."""
        return sum(example.num_targets for example in self.examples)


def gradients_of(
    base: FrozenBase,
    active: Sequence[TrainState],
    *,
    micro_batch_tokens: int,
    trunk: TrunkStore | None,
    checkpointing: bool = False,
) -> list[Gradient]:
    """Adds the gradient of each run's mean loss; waits for the device once, at the end."""
    batches = {id(run): run.order.batch(run.step) for run in active}
    items = [
        _Item(run, slot, example) for run in active for slot, example in enumerate(batches[id(run)])
    ]
    num_targets = {key: sum(e.num_targets for e in batch) for key, batch in batches.items()}
    lowest = min(lowest_layer(run.adapter.plan, base=base) for run in active)
    entry = lowest if trunk is not None and lowest > 0 and base.has_trunk else 0
    pieces: dict[int, list[Tensor]] = {key: [] for key in batches}
    lengths = [item.example.num_tokens for item in items]
    for batch in batches_by_tokens(lengths, budget=micro_batch_tokens):
        part = items[batch.start : batch.stop]
        states = None
        if trunk is not None and entry > 0:
            states = trunk.states([item.example for item in part], layer=entry)
        found = _backward(
            base,
            part,
            num_targets=num_targets,
            trunk=states,
            recompute_from=lowest if checkpointing else None,
        )
        for key, nll in found:
            pieces[key].append(nll)
    nlls = [torch.cat(pieces[id(run)]) for run in active]
    norms = [_norm(run) for run in active]
    sums = [nll.double().sum() for nll in nlls]
    values = torch.stack([*sums, *(norm.double() for norm in norms)]).tolist()
    return [
        Gradient(run, batches[id(run)], *found)
        for run, *found in zip(
            active, nlls, norms, values[: len(active)], values[len(active) :], strict=True
        )
    ]


def _backward(
    base: FrozenBase,
    part: Sequence[_Item],
    *,
    num_targets: dict[int, int],
    trunk: Trunk | None,
    recompute_from: int | None,
) -> list[tuple[int, Tensor]]:
    """Adds the gradients of one packed row; returns the targets' NLL by ``id(run)``."""
    row = pack([item.example for item in part], device=base.device)
    groups = [list(group) for _, group in groupby(part, key=lambda item: id(item.run))]
    nll = base.token_nll(row, routes=_routes(groups), trunk=trunk, recompute_from=recompute_from)
    shares = nll.split([sum(item.example.num_targets for item in group) for group in groups])
    total = nll.new_zeros(())
    for (first, *_), share in zip(groups, shares, strict=True):
        mean = share.sum() / num_targets[id(first.run)]
        total = total + first.run.scaler.scale(mean)
    total.backward()
    return [(id(group[0].run), share.detach()) for group, share in zip(groups, shares, strict=True)]


def _routes(groups: Sequence[Sequence[_Item]]) -> list[Route]:
    """Returns one route per run, for the items of each as they stand in the row."""
    routes, start = [], 0
    for mine in groups:
        lengths = [item.example.num_tokens for item in mine]
        routes.append(
            mine[0].run.route(slots=[item.slot for item in mine], lengths=lengths, start=start)
        )
        start += sum(lengths)
    return routes


def _norm(run: TrainState) -> Tensor:
    """Returns the norm of the run's unscaled gradient, on the device."""
    parameters = run.adapter.parameters.values()
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not run.scaler.is_enabled():
        return total
    # The gradient is unscaled only once it is known to be wanted: a scaler does that once a step.
    return total / run.scaler.scale(torch.ones_like(total))


def fault_of(gradient: Gradient) -> str | None:
    """Returns what is wrong with a run's loss or gradient; None if it can be used or skipped."""
    if not math.isfinite(gradient.nll_sum_nats):
        return _where_loss_broke(gradient)
    if not math.isfinite(gradient.norm_value) and not _may_skip(gradient.run):
        return _where_gradient_broke(gradient)
    return None


def _may_skip(run: TrainState) -> bool:
    return run.scaler.is_enabled() and run.scaler.get_scale() > _SMALLEST_LOSS_SCALE


def _where_loss_broke(gradient: Gradient) -> str:
    run = gradient.run
    per_example = gradient.nll.double().split([e.num_targets for e in gradient.examples])
    record, value = next(
        (example.record.row, value)
        for example, tokens in zip(gradient.examples, per_example, strict=True)
        if not math.isfinite(value := tokens.sum().item())
    )
    return (
        f"step {run.step + 1}: the loss of adapter '{run.adapter.name}' is {value} "
        f"on record {record}; lower train.learning_rate (now "
        f"{run.train.learning_rate:g}) or use dtype float32"
    )


def _where_gradient_broke(gradient: Gradient) -> str:
    run = gradient.run
    broken = [
        name
        for name, parameter in run.adapter.parameters.items()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    where = f"{len(broken)} tensors, first {broken[0]}" if broken else "their sum of squares"
    return (
        f"step {run.step + 1}: the gradient norm of adapter '{run.adapter.name}' is "
        f"{gradient.norm_value} ({where}); lower train.learning_rate (now "
        f"{run.train.learning_rate:g}) or use dtype float32"
    )
