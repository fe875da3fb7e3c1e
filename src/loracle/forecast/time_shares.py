"""How much of a run its validations take, and the setting that would change it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loracle.config.run import Config

# assumed: above it, a reader should know what sets it; below, it is as most would choose
_NOTABLE_FRAC = 1 / 3
_SUGGESTED_FRAC = 0.2
# assumed: fewer examples give a loss that differs by chance
_FEWEST = 100
# assumed: a token that trains costs its forward pass, the gradients of what enters each product,
# and as much again for adapters, dropout and the passes between products
_PASSES_TO_TRAIN = 3.0


@dataclass(frozen=True)
class Shares:
    """What of a run is validation."""

    validation: float
    """Time or work of all validations."""
    rest: float
    """Time or work of training and answers, in the same unit."""
    num_examples: int
    """Examples that a validation scores."""
    num_validations: int

    @property
    def frac(self) -> float:
        """Validations over all."""
        return self.validation / (self.validation + self.rest)

    def with_examples(self, count: int) -> float:
        """Returns the fraction if a validation scored so many examples."""
        less = self.validation * count / self.num_examples
        return less / (less + self.rest)

    def suggested_examples(self) -> int | None:
        """Returns fewer examples, a round number, with which validations take a fifth or less.

        None if they take little, or if no useful number does.
        """
        if self.frac <= _NOTABLE_FRAC:
            return None
        frac = _SUGGESTED_FRAC
        most = self.num_examples * frac / (1 - frac) * self.rest / self.validation
        if most < _FEWEST:
            return _FEWEST if self.num_examples > _FEWEST else None
        unit = 10 ** (int(math.log10(most)))
        return int(most // unit * unit)

    def words(self) -> str:
        """Returns the share in one line, and the setting that would lower it."""
        said = (
            f"validation: {self.frac:.0%} of the time ({self.num_validations} x "
            f"{self.num_examples:,} examples)"
        )
        count = self.suggested_examples()
        if count is None:
            return said
        return f"{said}; eval.max_examples={count} would make it {self.with_examples(count):.0%}"


def shares_of_tokens(config: Config, *, num_scored: int) -> Shares:
    """Returns the shares as counted in passes over examples, before anything is timed."""
    trained = config.train.max_steps * config.train.batch_size
    return Shares(
        validation=float(config.num_validations * num_scored),
        rest=_PASSES_TO_TRAIN * trained,
        num_examples=num_scored,
        num_validations=config.num_validations,
    )
