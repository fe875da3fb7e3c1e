"""Counts the live tensors of a run's first steps, which are off the clock anyway."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from loracle.engine.measure import MemoryMeter
from loracle.engine.train_state import TrainState
from loracle.model.base import FrozenBase
from loracle.model.live_bytes import LiveBytes
from loracle.text import GIB

_PHASE = "train"


class StepTensors:
    """What a step's tensors take at their most, over a few steps of one run alone.

    Counting costs a step of SmolLM2-135M about two seconds on a CPU and changes no bit of it. A GPU
    counts its tensors itself, so nothing is done there.

    Args:
        base: The base.
        run: The run; it must be alone.
        memory: Gets the peak, unless it knows it already.
        num_steps: Steps to count over.
    """

    def __init__(
        self, base: FrozenBase, run: TrainState, *, memory: MemoryMeter, num_steps: int
    ) -> None:
        self._base, self._run, self._memory = base, run, memory
        wanted = memory.device.type == "cpu" and _PHASE not in memory.tensors_gib
        # In its first step ever a run has no optimizer state yet.
        self._left = max(num_steps, 2) if wanted else 0
        self._live: LiveBytes | None = None

    def step(self) -> AbstractContextManager[object]:
        """Returns the block in which the next step is to be taken."""
        if self._left == 0:
            self._finish()
            return nullcontext()
        self._left -= 1
        if self._live is None:
            self._live = self._begin()
        return self._live

    def _begin(self) -> LiveBytes:
        live = LiveBytes()
        trained = list(self._run.adapter.parameters.values())
        live.hold(self._base.held_tensors(), "weights")
        live.hold(trained, "weights" if self._run.adapter.plan.is_full else "adapters")
        moments = (
            value for state in self._run.optimizer.state.values() for value in state.values()
        )
        live.hold(moments, "optimizer")
        return live

    def _finish(self) -> None:
        if self._live is not None:
            self._memory.tensors_gib[_PHASE] = self._live.peak_bytes / GIB
            self._live = None
