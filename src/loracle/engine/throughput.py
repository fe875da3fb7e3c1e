"""Tokens per second of a linear layer by row count, and where the device is saturated."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loracle.engine.device import synchronize
from loracle.model.faults import is_out_of_memory

# assumed: beyond nine tenths of the best rate, more tokens are not worth their memory
_SATURATED_FRAC = 0.9
# assumed: steps differ in length, and the allocator needs room between blocks
USABLE_FRAC = 0.8
# assumed: range of the probe; the last is more than any bundle of small runs holds
_PROBED_TOKENS = tuple(256 << k for k in range(9))
_REPEATS = 5


def saturation_tokens(rates: Sequence[tuple[int, float]]) -> int:
    """Returns the smallest token count near the best rate; ``rates`` as from `token_rates`."""
    best = max(rate for _, rate in rates)
    return next(count for count, rate in rates if rate >= _SATURATED_FRAC * best)


def token_rates(
    weight: Tensor, *, counts: Sequence[int] = _PROBED_TOKENS, repeats: int = _REPEATS
) -> list[tuple[int, float]]:
    """Returns growing token counts, each with the tokens per second of a linear layer.

    The rate is that of the fastest repeat. Counts that do not fit in memory are left out.

    Args:
        weight: Weight of one layer of the base, (features out, features in).
        counts: Token counts in rising order.
        repeats: Timed products per count, after a warm-up.
    """
    rates: list[tuple[int, float]] = []
    for count in counts:
        try:
            rates.append((count, count / _fastest_s(weight, count=count, repeats=repeats)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
    return rates


def _fastest_s(weight: Tensor, *, count: int, repeats: int) -> float:
    x = torch.ones(count, weight.shape[1], dtype=weight.dtype, device=weight.device)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            synchronize(weight.device)
            started_at = time.perf_counter()
            nn.functional.linear(x, weight)
            synchronize(weight.device)
            times.append(time.perf_counter() - started_at)
    return min(times[1:])
