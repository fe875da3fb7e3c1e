"""What memory is for, said where it is taken: what counts live tensors reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["weights", "adapters", "gradients", "optimizer", "activations", "head"]

_inside: list[Part] = []


@contextmanager
def computing(part: Part) -> Iterator[None]:
    """Says that what is allocated inside the block belongs to ``part``."""
    _inside.append(part)
    try:
        yield
    finally:
        _inside.pop()


def part_now() -> Part:
    """Returns the part of the innermost block; outside of all, activations."""
    return _inside[-1] if _inside else "activations"
