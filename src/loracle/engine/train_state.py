"""State of a run while it trains: adapter, optimizer, data order, scaler, and its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loracle.config.run import TrainConfig
from loracle.data import Example
from loracle.engine.schedule import DataOrder
from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.model.layers.dropout import DropoutStream, threshold_of
from loracle.model.layers.routing import Route

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""AdamW's state of one parameter."""


@dataclass
class TrainState:
    """Everything of one run that the training loop reads and changes."""

    adapter: Adapter
    order: DataOrder[Example]
    train: TrainConfig
    dropout: float
    seed: int
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    step: int = 0
    """Optimizer steps done."""
    failure: str | None = None
    """Why it cannot continue; None: no failure."""

    @property
    def is_done(self) -> bool:
        """True when every step has been taken."""
        return self.step >= self.train.max_steps

    @property
    def is_active(self) -> bool:
        """True while steps are left and it has not failed."""
        return not self.is_done and self.failure is None

    def drop_partial_moments(self) -> None:
        """Drops the moments of parameters for which not all could be allocated."""
        for parameter, moments in list(self.optimizer.state.items()):
            if not moments.keys() >= _MOMENTS:
                del self.optimizer.state[parameter]

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
) -> TrainState:
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
    return TrainState(
        adapter=adapter,
        order=DataOrder(examples, batch_size=train.batch_size, seed=seed),
        train=train,
        dropout=dropout,
        seed=seed,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(base.device.type, enabled=scaled),
    )


def capture_state(run: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the plain data from which ``restore_state`` continues exactly.

    A run that has taken all steps needs no moments any more, which are two thirds of its tensors.
    Random streams, schedule and position in the data are functions of seed and step, so the step
    is all that is kept of them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in run.adapter.parameters.items():
        tensors[f"adapter/{name}"] = parameter.detach()
        if run.is_done:
            continue
        for key, value in run.optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = value
    return tensors, {"step": run.step, "scaler": run.scaler.state_dict()}


def restore_state(run: TrainState, *, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Puts a run back to the step whose state was captured."""
    for name, parameter in run.adapter.parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"adapter/{name}"])
        moments = (f"optimizer/{key}/{name}" for key in sorted(_MOMENTS))
        run.optimizer.state[parameter] = {
            key.split("/")[1]: tensors[key].to(parameter.device, copy=True)
            for key in moments
            if key in tensors
        }
    run.step, run.failure = state["step"], None
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
