"""The decoder's list of blocks, and forward passes that run only a part of it.

A skipped block returns given hidden states instead, whatever its input. So the rest of the model
runs as its authors wrote it, without any knowledge of how blocks are called.

Shapes: T tokens in the row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loracle.errors import ModelError


@dataclass(frozen=True)
class Trunk:
    """A start for forward passes above blocks without adapters."""

    layer: int
    """First block that is computed; the number of blocks if only the head is."""
    states: Float[Tensor, "T H"]
    """Its input for every token of the row."""


def decoder_prefix(model: nn.Module) -> str:
    """Returns what the names of all modules of the decoder begin with.

    Empty if Transformers does not hand the decoder out, or hands out something without blocks.
    """
    decoder = cast("Any", model).get_decoder() if hasattr(model, "get_decoder") else model
    if any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return next(
            f"{n}." if n else "" for n, module in model.named_modules() if module is decoder
        )
    return ""


def blocks_name_of(model: nn.Module) -> str:
    """Returns the name of the decoder's module list with most parameters: its blocks.

    Tables of embeddings do not count. Works for a model with adapters too. Of two nested lists the
    outer one comes first and holds at least as many parameters.

    Raises:
        ModelError: If the decoder has no list of modules.
    """
    decoder = decoder_prefix(model)
    sizes: dict[str, int] = {
        name: _num_parameters(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(decoder)
    }
    if not sizes:
        raise ModelError(f"model: {type(model).__name__} has no list of blocks")
    return max(sizes, key=lambda name: sizes[name])


def _num_parameters(module: nn.Module) -> int:
    inner = (m for m in module.modules() if not isinstance(m, nn.Embedding))
    return sum(parameter.numel() for m in inner for parameter in m.parameters(recurse=False))


@contextmanager
def replaying(blocks: Sequence[nn.Module], output: Callable[[], Tensor]) -> Iterator[None]:
    """Makes ``blocks`` return ``output()`` inside the context, without computing anything."""
    for block in blocks:
        block.forward = lambda *_args, **_kwargs: output()
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def recording(blocks: Sequence[nn.Module]) -> Iterator[list[object]]:
    """Yields the list of the outputs of ``blocks``, in the order of their calls."""
    outputs: list[object] = []
    hooks = [
        block.register_forward_hook(lambda _block, _args, out: outputs.append(out))
        for block in blocks
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def states_entering(
    layer: int, *, blocks: Sequence[nn.Module], run: Callable[[], object]
) -> Float[Tensor, "T H"]:
    """Returns the input of block ``layer`` (from 1) when ``run`` passes one row through the model.

    Blocks from ``layer`` up are not computed.
    """
    with recording(blocks[layer - 1 : layer]) as outputs:

        def output() -> Tensor:
            (states,) = outputs
            assert isinstance(states, Tensor)
            return states

        with replaying(blocks[layer:], output):
            run()
    return output()[0]


def blocks_stand_alone(
    blocks: Sequence[nn.Module], *, run: Callable[[], object], run_other: Callable[[], object]
) -> bool:
    """Returns True if a block receives nothing but hidden states from the one below, by a test.

    Each block is computed alone, between blocks that replay their outputs of a whole pass; it must
    return the same bits. A model that passes keys, values or experts' choices upwards in another
    way fails or returns something else.

    Args:
        blocks: The decoder's blocks, in order.
        run: One forward pass of the decoder over some tokens.
        run_other: The same over as many other tokens, to overwrite any state that the first pass
            left in the model.
    """
    with recording(blocks) as recorded:
        run()
    outputs = [output for output in recorded if isinstance(output, Tensor)]
    if len(outputs) != len(blocks) or len(recorded) != len(blocks):
        return False
    run_other()
    try:
        return all(
            _stands_alone(index, blocks=blocks, outputs=outputs, run=run)
            for index in reversed(range(len(blocks)))
        )
    except (AttributeError, LookupError, TypeError):
        # Raised by blocks that read state which a lower block should have left.
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
