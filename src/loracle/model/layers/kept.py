"""Small tensors that every layer of a pass needs, kept so that they are made once.

Each function keeps a few of them, for the pass under way; all are let go when memory runs out. None
is made in inference mode, in which it would be unusable for a gradient later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Make = TypeVar("Make", bound=Callable[..., Tensor])

_KEEPERS: list[Any] = []


def kept(*, most: int) -> Callable[[Make], Make]:
    """Returns a decorator of functions that make tensors; ``most`` of each are kept."""

    def decorate(make: Make) -> Make:
        @wraps(make)
        def made(*args: Any) -> Tensor:
            with torch.inference_mode(False):
                return make(*args)

        keeper: Any = lru_cache(maxsize=most)(made)
        _KEEPERS.append(keeper)
        return keeper  # type: ignore[no-any-return]

    return decorate


def forget_kept() -> None:
    """Lets go of every kept tensor."""
    for keeper in _KEEPERS:
        keeper.cache_clear()


def num_kept() -> int:
    """Returns how many tensors are kept now."""
    return sum(keeper.cache_info().currsize for keeper in _KEEPERS)
