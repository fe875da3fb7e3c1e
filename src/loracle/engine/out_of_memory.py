"""Recovers from running out of memory: halves the pass and repeats the step.

Masks and data order are functions of the step, so a repeated step sees the same ones; its division
into passes changes rounding and nothing else.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import psutil
import torch

from loracle.data.packing import batches_by_tokens
from loracle.engine.device import release_free_memory
from loracle.errors import OutOfMemory
from loracle.model.faults import is_out_of_memory
from loracle.model.layers.kept import forget_kept

T = TypeVar("T")

# assumed: a thread's stack and thread-local data, and what a pass keeps beside its tensors
_RESERVE_BYTES = 32 << 20

Halved = Callable[[int, int], None]
"""Called with the tokens of a pass before and after halving."""


def say_nothing(_before: int, _after: int) -> None:
    """Does nothing when a pass is halved."""


class PassBudget:
    """Tokens per forward pass, halved each time that memory runs out; ``halved`` reports it."""

    def __init__(self, tokens: int, *, halved: Halved = say_nothing) -> None:
        self.tokens = tokens
        self._halved = halved

    def fit(
        self,
        attempt: Callable[[int], T],
        *,
        lengths: Sequence[int],
        undo: Callable[[], None],
        where: str,
    ) -> T:
        """Returns ``attempt(tokens)`` for the largest budget that memory allows.

        Args:
            attempt: Takes the tokens per pass.
            lengths: Tokens of each sequence that it divides into passes, in order.
            undo: Removes what a failed attempt left behind.
            where: Start of the error message.

        Raises:
            OutOfMemory: If not even a single sequence fits.
        """
        while True:
            try:
                return attempt(self.tokens)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
            # The error is deleted by now, and with it the tensors of the failed pass.
            undo()
            free_memory()
            largest = largest_pass(lengths, budget=self.tokens)
            half = max(largest // 2, 1)
            if largest_pass(lengths, budget=half) == largest:
                raise OutOfMemory(
                    f"{where}: a sequence of {largest} tokens by itself needs more memory than "
                    "there is; set train.gradient_checkpointing=true or lower data.max_tokens "
                    "(`loracle plan` says what fits)"
                )
            before, self.tokens = self.tokens, half
            self._halved(before, half)


def twice(action: Callable[[], None], *, undo: Callable[[], None], where: str) -> None:
    """Does what has no smaller form; where memory runs out, once more in memory that was freed.

    Args:
        action: The work; it changes nothing that ``undo`` does not put back.
        undo: Removes what a failed attempt left behind.
        where: Start of the error message.

    Raises:
        OutOfMemory: If it does not fit then either.
    """
    for is_last in (False, True):
        try:
            action()
            break
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        undo()
        free_memory()
        if is_last:
            raise OutOfMemory(
                f"{where}: the update of the trained weights needs more memory than there is; "
                "lower lora.rank, adapt fewer modules, or train fewer runs together"
            )


def largest_pass(lengths: Sequence[int], *, budget: int) -> int:
    """Returns the tokens of the largest pass into which the sequences are divided."""
    return max(
        sum(lengths[batch.start : batch.stop])
        for batch in batches_by_tokens(lengths, budget=budget)
    )


def require_address_space(where: str) -> None:
    """Checks that a process with limited address space (``ulimit -v``) has some left.

    Below that, libraries abort the process where they should raise: glibc for thread-local data.

    Raises:
        OutOfMemory: If it has not.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed == resource.RLIM_INFINITY:
        return
    left = allowed - psutil.Process().memory_info().vms
    if left < _RESERVE_BYTES:
        raise OutOfMemory(
            f"{where}: out of memory: {max(left, 0) >> 20} MiB are left of the {allowed >> 20} MiB "
            "of address space that are allowed here (ulimit -v)"
        )


def free_memory() -> None:
    """Returns unused memory to the device and to the system."""
    forget_kept()
    gc.collect()
    release_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_faults(where: str, *, remedy: str) -> Iterator[None]:
    """Raises OutOfMemory, its message from ``where`` to ``remedy``, if memory runs out inside."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{where}: out of memory; {remedy}") from None
