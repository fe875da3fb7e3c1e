"""The decoder's list of blocks, and forward passes that run only a part of it.

A block that is left out hands on given hidden states instead, whatever comes in. So the rest of
the model runs as its authors wrote it, and nothing needs to know how they call their blocks.

Shapes: T tokens in the row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Trunk:
    """Where a forward pass may begin, because nothing below has an adapter."""

    layer: int
    """First block that is computed; as many as there are blocks: the head alone."""
    states: Float[Tensor, "T H"]
    """Hidden states that enter it, for every token of the row."""


def blocks_name_of(model: nn.Module) -> str:
    """Returns the name of the module list that holds most parameters: the decoder's blocks.

    Unlike an inventory it can be asked of a model that already carries adapters. The outer of two
    nested lists is named first and holds all that the inner one does.
    """
    sizes: dict[str, int] = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return max(sizes, key=lambda name: sizes[name])


@contextmanager
def replaying(blocks: Sequence[nn.Module], output: Callable[[], Tensor]) -> Iterator[None]:
    """Lets ``blocks`` return ``output()`` inside the block, without computing anything."""
    for block in blocks:
        block.forward = lambda *_args, **_kwargs: output()
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def recording(blocks: Sequence[nn.Module]) -> Iterator[list[object]]:
    """Yields the list that gathers what ``blocks`` return, in the order of their calls."""
    found: list[object] = []
    hooks = [
        block.register_forward_hook(lambda _block, _args, out: found.append(out))
        for block in blocks
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def states_entering(
    layer: int, *, blocks: Sequence[nn.Module], run: Callable[[], object]
) -> Float[Tensor, "T H"]:
    """Returns what enters block ``layer`` (from 1) when ``run`` passes one row through the model.

    Blocks from ``layer`` up are not computed.
    """
    with recording(blocks[layer - 1 : layer]) as found:

        def handed_on() -> Tensor:
            (states,) = found
            assert isinstance(states, Tensor)
            return states

        with replaying(blocks[layer:], handed_on):
            run()
    return handed_on()[0]


def blocks_stand_alone(
    blocks: Sequence[nn.Module], *, run: Callable[[], object], run_other: Callable[[], object]
) -> bool:
    """True if hidden states are all that one block hands to the next, judged by the numbers.

    Each block is computed alone, between blocks that replay what they returned in a whole pass; it
    must return the same bits. A model that passes keys, values or experts' choices upwards by
    another way shows here: it fails, or returns something else.

    Args:
        blocks: The decoder's blocks, in order.
        run: One forward pass of the decoder over some tokens.
        run_other: The same over as many other tokens; what it leaves behind must not be taken for
            what the first pass left.
    """
    with recording(blocks) as whole:
        run()
    outputs = [output for output in whole if isinstance(output, Tensor)]
    if len(outputs) != len(blocks) or len(whole) != len(blocks):
        return False
    run_other()
    try:
        return all(
            _stands_alone(index, blocks=blocks, outputs=outputs, run=run)
            for index in reversed(range(len(blocks)))
        )
    except (AttributeError, LookupError, TypeError):
        # How blocks fail that look for what a lower one should have left for them.
        return False


def _stands_alone(
    index: int,
    *,
    blocks: Sequence[nn.Module],
    outputs: Sequence[Tensor],
    run: Callable[[], object],
) -> bool:
    below, above = blocks[:index], blocks[index + 1 :]
    with (
        replaying(below, lambda: outputs[index - 1]),
        replaying(above, lambda: outputs[index]),
        recording(blocks[index : index + 1]) as alone,
    ):
        run()
    (output,) = alone
    return isinstance(output, Tensor) and torch.equal(output, outputs[index])
