"""Gradient checkpointing: a decoder block saves only its input for the backward pass.

Its activations are then recomputed through the same routes and with the same masks, so the
gradients have the same bits. Blocks below the lowest adapter have no gradient and are not changed.

Source: Chen et al. 2016 arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from loracle.model.layers.routing import Router


@contextmanager
def recomputing(blocks: Sequence[nn.Module], *, router: Router) -> Iterator[None]:
    """Makes ``blocks`` save only their input inside the context; ``router`` is replayed."""
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, router)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputed(forward: Callable[..., Any], router: Router, *args: Any, **kwargs: Any) -> Any:
    routes, units = router.routes, router.units
    assert routes is not None, "a pass that trains follows routes"

    def compute(*args: Any, **kwargs: Any) -> Any:
        # At the second time the pass is over, and the router follows nothing any more.
        with router.following(routes, units=units):
            return forward(*args, **kwargs)

    # Masks are functions of their names and nothing else is random, so no state is restored.
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
