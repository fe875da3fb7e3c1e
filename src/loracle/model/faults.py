"""Faults of libraries at a model, as one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loracle.errors import LoracleError, ModelError

_MOST = 300


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its class."""
    lines = str(error).strip().splitlines()
    return (lines or [type(error).__name__])[0].strip()[:_MOST]


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if the allocator of a GPU or a CPU ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator has no exception class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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
