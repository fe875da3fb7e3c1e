"""Faults of libraries at a model, as one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loracle.errors import LoracleError, ModelError, means_out_of_memory

_MOST = 300


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its class."""
    lines = str(error).strip().splitlines()
    return (lines or [type(error).__name__])[0].strip()[:_MOST]


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if the allocator of a GPU, a CPU or a library ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or means_out_of_memory(error)


@contextmanager
def model_faults(what: str, *, reason: Callable[[Exception], str] = first_line) -> Iterator[None]:
    """Raises ``what (reason)`` as a ModelError for whatever a library raises inside.

    A library that meets a folder or an architecture that it does not know can raise anything, and
    none of it is a fault of ours. Running out of memory passes through.
    """
    try:
        yield
    except LoracleError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{what} ({reason(error)})") from error
