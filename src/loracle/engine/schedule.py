"""Learning rate and data order as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from loracle.config.run import TrainConfig
from loracle.seeds import numpy_stream

T = TypeVar("T")


def learning_rate(step: int, *, train: TrainConfig) -> float:
    """Returns the learning rate of optimizer step ``step``, counted from 0.

    Linear from 0 over ``ceil(warmup_frac * max_steps)`` steps, then the schedule; the very first
    warm-up step has rate 0, as in Transformers, with which it agrees (tested). A run of one step
    has no warm-up: at rate 0 it would not train.
    Source: get_scheduler, huggingface/transformers@v5.23.0 src/transformers/optimization.py.
    """
    warmup = math.ceil(train.warmup_frac * train.max_steps) if train.max_steps > 1 else 0
    if step < warmup:
        return train.learning_rate * step / warmup
    done = (step - warmup) / max(1, train.max_steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - done),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))),
    }
    return train.learning_rate * shape[train.schedule]


@dataclass(frozen=True)
class DataOrder(Generic[T]):
    """The examples of every step: shuffled epochs, end to end.

    A batch may cross from one epoch to the next, so every example is seen once per epoch and every
    step has ``batch_size`` examples.
    """

    examples: Sequence[T]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch."""
        return len(self.examples) / self.batch_size

    def batch(self, step: int) -> list[T]:
        """Returns the examples of optimizer step ``step``, counted from 0."""
        size, start = len(self.examples), step * self.batch_size
        places = (divmod(start + slot, size) for slot in range(self.batch_size))
        return [
            self.examples[_epoch_order(self.seed, epoch, size)[place]] for epoch, place in places
        ]


@lru_cache(maxsize=64)
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    return tuple(numpy_stream(seed, "order", epoch).permutation(size).tolist())
