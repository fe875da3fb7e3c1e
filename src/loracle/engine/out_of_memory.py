"""What is done when memory runs out: the pass is halved and taken again, and no figure changes.

Masks and order are functions of the step, so a step that is taken again sees the same; how it is
cut into passes changes rounding and nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from loracle.data.packing import batches_by_tokens
from loracle.engine.device import release_free_memory
from loracle.errors import OutOfMemory

T = TypeVar("T")

Halved = Callable[[int, int], None]
"""Takes the tokens of a pass before and after it was halved."""


def say_nothing(_before: int, _after: int) -> None:
    """Takes what was halved and drops it."""


class PassBudget:
    """Tokens per forward pass; fewer each time that memory runs out.

    Args:
        tokens: To begin with.
        halved: Told of every time.
    """

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
        """Returns what ``attempt`` returns for the largest budget that memory allows.

        Args:
            attempt: Takes the tokens per pass.
            lengths: Tokens of each sequence that it cuts into passes, in order.
            undo: Takes back what a failed attempt left behind.
            where: Begins the message if nothing helps.

        Raises:
            OutOfMemory: If it does not fit with a sequence by itself.
        """
        while True:
            try:
                return attempt(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # The error is gone by here, and with it the tensors of the pass that failed.
            undo()
            let_go_of_memory()
            self._halve(lengths, where=where)

    def _halve(self, lengths: Sequence[int], *, where: str) -> None:
        largest = largest_pass(lengths, budget=self.tokens)
        half = max(largest // 2, 1)
        if largest_pass(lengths, budget=half) == largest:
            raise OutOfMemory(
                f"{where}: a sequence of {largest} tokens by itself needs more memory than there "
                "is; set train.gradient_checkpointing=true or lower data.max_tokens (`loracle "
                "plan` says what fits)"
            )
        before, self.tokens = self.tokens, half
        self._halved(before, half)


def largest_pass(lengths: Sequence[int], *, budget: int) -> int:
    """Returns the tokens of the largest pass that these sequences are cut into."""
    return max(
        sum(lengths[batch.start : batch.stop])
        for batch in batches_by_tokens(lengths, budget=budget)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that an allocator had no more to give, a GPU's or a CPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator has no class of its own; this is from its message.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def let_go_of_memory() -> None:
    """Returns what nothing uses to the device and to the system."""
    gc.collect()
    release_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_faults(where: str, *, remedy: str) -> Iterator[None]:
    """Makes running out of memory inside the block an error of ours.

    Args:
        where: Begins the message.
        remedy: Ends it.

    Raises:
        OutOfMemory: If memory runs out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{where}: out of memory; {remedy}") from None
