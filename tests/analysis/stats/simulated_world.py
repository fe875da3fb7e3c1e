"""What is true in a simulated study: its arms, its noise, its examples."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.config.files import load_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = (*ATTENTION, *FEED_FORWARD)
BASE_PARAMS = 134_515_008
LEVEL_NATS, GAIN_NATS = 1.8, 0.2
_WORDS = (
    *("the", "a", "river", "runs", "over", "stones", "while", "people", "read", "old", "books"),
    *("about", "small", "planets", "and", "their", "moons", "each", "morning", "before", "work"),
    *("starts", "again", "slowly", "because", "rain", "keeps", "falling", "on", "roofs"),
)


@dataclass(frozen=True)
class SimulatedArm:
    """An arm and what is true of it."""

    name: str
    effect_nats: float = 0.0
    """Its loss minus the reference arm's, nats per token."""
    kinds: tuple[str, ...] = ALL_LINEAR
    thirds: tuple[int, ...] = (0, 1, 2)
    """Thirds of the layers that it adapts."""
    every: int = 1
    """Of the modules so chosen, every so manyth."""
    kept_words: float = 0.5
    """Fraction of the reference answer's words in its answers: its BLEU."""
    step_time_s: float | None = 3.7
    peak_memory_gib: float | None = 4.7
    latency_ms: float | None = 58.0
    rank: int | None = None
    """r of its adapters; None: what the budget implies."""
    is_full: bool = False
    """Full fine-tuning: no adapters."""


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a loss, nats per token."""

    seed: float = 0.001
    """Between the seeds of an arm."""
    example: float = 0.02
    """Between examples, of an arm's own effect on them."""
    both: float = 0.01
    """Of an example in a run."""
    repeat: float = 0.0
    """Between two runs of one seed."""


@dataclass(frozen=True)
class World:
    """What every run of a study shares."""

    draw_seed: int
    tokens: NDArray[np.int64]
    """Target tokens of each example."""
    level_nats: NDArray[np.float64]
    """Loss per token of each example without training."""
    references: tuple[str, ...]
    num_answers: int
    max_steps: int
    noise: Noise
    config: Mapping[str, Any]

    @property
    def base_nll_nats(self) -> NDArray[np.float64]:
        return self.tokens * self.level_nats

    def draws(self, *words: object) -> np.random.Generator:
        """Returns a stream of its own for what ``words`` name."""
        digest = hashlib.sha256(repr((self.draw_seed, words)).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def make_world(
    num_examples: int, *, num_answers: int, max_steps: int, noise: Noise | None, seed: int
) -> World:
    draw = np.random.default_rng(seed)
    tokens = np.clip(draw.lognormal(4.4, 0.9, num_examples), 4, 470).astype(np.int64)
    lengths = draw.integers(6, 18, num_examples)
    config = load_config("demo", overrides=[f"train.max_steps={max_steps}"]).model_dump(mode="json")
    return World(
        draw_seed=seed,
        tokens=tokens,
        level_nats=draw.normal(LEVEL_NATS, 0.25, num_examples),
        references=tuple(" ".join(draw.choice(_WORDS, n)) + "." for n in lengths),
        num_answers=min(num_answers, num_examples),
        max_steps=max_steps,
        noise=noise or Noise(),
        config=config,
    )
