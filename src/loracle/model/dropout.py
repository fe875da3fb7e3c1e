"""LoRA dropout whose mask is a function of its name.

Each (run seed, step, module, slot) names a stream, where the slot is the place of a sequence in its
run's batch. So a mask is the same however the step was cut into micro-batches and whatever shared
the row, it is recomputed in the backward pass instead of being kept, and nothing needs saving to
resume.

An element is dropped when its 16-bit word is below a threshold. ``round(p * 65536) / 65536`` is the
probability that is realised (0.1 becomes 0.100006) and the one the scale is computed from, so the
expectation is exact.

Shapes: T tokens of a run in the row, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from loracle.seeds import stream_seed

_WORDS = 1 << 16


@dataclass(frozen=True)
class DropoutStream:
    """Names the masks of one run in one packed row."""

    threshold: int
    """Words below it are dropped."""
    seed: int
    """The run's seed."""
    step: int
    """Optimizer step, from 0."""
    slots: tuple[int, ...]
    """Place of each sequence in the run's batch."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""

    @property
    def scale(self) -> float:
        """1 / (1 - p) for the probability that is realised."""
        return _WORDS / (_WORDS - self.threshold)


def threshold_of(probability: float) -> int:
    """Returns the 16-bit threshold nearest to a dropout probability."""
    return min(round(probability * _WORDS), _WORDS - 1)


def keep_mask(
    stream: DropoutStream, *, module: str, features: int, device: torch.device
) -> Bool[Tensor, "T {features}"]:
    """Returns True where an element of the module's input is kept.

    ``random_`` fills only 63 bits unless told otherwise, which would give every fourth word half
    of its range and double the dropout there; hence the explicit lower end.
    """
    parts = []
    for slot, length in zip(stream.slots, stream.lengths, strict=True):
        generator = torch.Generator(device=device)
        generator.manual_seed(stream_seed(stream.seed, "dropout", stream.step, module, slot))
        count = length * features
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=generator)
        parts.append(words.view(torch.int16)[:count].view(length, features))
    words = parts[0] if len(parts) == 1 else torch.cat(parts)
    return words >= stream.threshold - _WORDS // 2
