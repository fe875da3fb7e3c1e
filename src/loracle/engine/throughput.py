"""Tokens per second of a linear layer by row count, and where the device is saturated."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loracle.engine.device import synchronize

# assumed: at nine tenths of the best rate more tokens no longer pay for the memory they take
_SATURATED_FRAC = 0.9


# assumed: steps differ in length, and the allocator needs room between blocks
USABLE_FRAC = 0.8


# assumed: where the probe starts and ends; the last is more than any bundle of small runs holds
_PROBED_TOKENS = tuple(256 << k for k in range(9))


_REPEATS = 5


def saturation_tokens(rates: Sequence[tuple[int, float]]) -> int:
    """Returns the smallest measured token count that comes near the best rate.

    Args:
        rates: Token counts in rising order, each with its tokens per second.
    """
    best = max(rate for _, rate in rates)
    return next(count for count, rate in rates if rate >= _SATURATED_FRAC * best)


def token_rates(
    weight: Tensor, *, counts: Sequence[int] = _PROBED_TOKENS, repeats: int = _REPEATS
) -> list[tuple[int, float]]:
    """Returns the tokens per second of a linear layer at growing token counts.

    The fastest of a few repeats: what the device can, undisturbed. It ends where memory does.

    Args:
        weight: Of one layer of the base, (features out, features in).
        counts: Token counts in rising order.
        repeats: Timed products of each count, after one that is not.
    """
    found: list[tuple[int, float]] = []
    for count in counts:
        try:
            found.append((count, count / _fastest_s(weight, count=count, repeats=repeats)))
        except torch.OutOfMemoryError:
            break
    return found


def _fastest_s(weight: Tensor, *, count: int, repeats: int) -> float:
    x = torch.ones(count, weight.shape[1], dtype=weight.dtype, device=weight.device)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            synchronize(weight.device)
            began = time.perf_counter()
            nn.functional.linear(x, weight)
            synchronize(weight.device)
            times.append(time.perf_counter() - began)
    return min(times[1:])
