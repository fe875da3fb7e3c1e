"""How many runs train together, which ones, and why.

A bundle shares the base's matrix products. That pays until a step holds as many tokens as the
device multiplies at full speed, and goes as far as memory reaches. Nothing here changes a figure
beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracle.engine.throughput import USABLE_FRAC, saturation_tokens
from loracle.errors import UsageError


@dataclass(frozen=True)
class StepMemory:
    """Memory of the device, in GiB."""

    base_gib: float
    """The base alone."""
    step_gib: float
    """Peak of one real step of one run."""
    free_gib: float
    """Free beside the base."""


@dataclass(frozen=True)
class BundleChoice:
    """Bundle size and the reason for it."""

    size: int
    reason: str
    """One line for a person."""
    tokens_per_step: float | None = None
    """Mean tokens of one run's step; null: not needed."""
    saturation_tokens: int | None = None
    """Tokens of a step above which throughput no longer rises; null: not measured."""
    tokens_per_s: tuple[tuple[int, float], ...] = ()
    """Throughput of a linear layer by token count; empty: not measured."""
    memory: StepMemory | None = None
    """null: not measured."""


def choose_bundle_size(
    *,
    num_runs: int,
    requested: int | None,
    device_type: str,
    tokens_per_step: float,
    rates: Callable[[], Sequence[tuple[int, float]]],
    memory: Callable[[], StepMemory | None],
) -> BundleChoice:
    """Returns the number of runs that train together.

    Args:
        num_runs: Runs to do.
        requested: The caller's choice; None chooses.
        device_type: ``cpu`` or ``cuda``.
        tokens_per_step: Mean real tokens of one run's step.
        rates: Measures ``token_rates``; called only where its answer matters.
        memory: Measures one step; called only where its answer matters, None if it cannot.

    Raises:
        UsageError: If the requested runs do not fit together.
    """
    if num_runs == 1:
        return BundleChoice(1, "one run", tokens_per_step)
    if requested is not None:
        size = min(requested, num_runs)
        if size > 1 and device_type == "cuda":
            _require_fitting(size, memory())
        return BundleChoice(size, "as asked", tokens_per_step)
    if device_type == "cpu":
        return BundleChoice(
            1, f"one run's {tokens_per_step:.0f} tokens per step fill a CPU", tokens_per_step
        )
    measured = tuple(rates())
    enough = saturation_tokens(measured)
    gaining = max(1, min(num_runs, math.ceil(enough / tokens_per_step)))
    step = memory() if gaining > 1 else None
    fitting = _fitting(step) if step else gaining
    size = max(1, min(gaining, fitting))
    limit = "memory" if size < gaining else "the runs there are" if size == num_runs else "speed"
    reason = (
        f"{tokens_per_step:.0f} tokens per step of a run, {enough} fill the device, memory for "
        f"{fitting if step else 'n/a'} runs: limited by {limit}"
    )
    return BundleChoice(size, reason, tokens_per_step, enough, measured, step)


def _require_fitting(size: int, memory: StepMemory | None) -> None:
    if memory is not None and size > _fitting(memory):
        run_gib = memory.step_gib - memory.base_gib
        raise UsageError(
            f"bundle_size: {size} runs of {run_gib:.1f} GiB each do not fit in the "
            f"{memory.free_gib:.1f} GiB that are free beside the base; at most "
            f"{max(1, _fitting(memory))} do"
        )


def _fitting(memory: StepMemory) -> int:
    run_gib = max(memory.step_gib - memory.base_gib, 1e-6)
    return int(USABLE_FRAC * memory.free_gib / run_gib)


def group_runs(lowest_layers: Sequence[int], *, size: int) -> list[list[int]]:
    """Returns the runs of each bundle, as indices.

    The first run that is left opens a bundle; those whose lowest adapted layer is nearest to its
    own join it, to share the frozen trunk. Bundles keep the order of the runs; the last may have
    fewer than ``size``.
    """
    left = list(range(len(lowest_layers)))
    bundles = []
    while left:
        layer = lowest_layers[left[0]]
        # Of two as near, the one above: it does not lower where the bundle's trunk ends.
        nearest = sorted(left[1:], key=lambda i: (abs(lowest_layers[i] - layer), -lowest_layers[i]))
        bundle = sorted([left[0], *nearest[: size - 1]])
        bundles.append(bundle)
        left = [index for index in left if index not in bundle]
    return bundles


def bundle_budget(budgets: Sequence[int], *, device_type: str) -> int:
    """Returns the tokens per forward pass of a bundle whose runs allow ``budgets`` each.

    A GPU is filled by the tokens of all at once, which is what a bundle is for; a CPU is full at
    one run's, and more would cost memory only.
    """
    return sum(budgets) if device_type == "cuda" else min(budgets)
