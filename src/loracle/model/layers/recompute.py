"""Gradient checkpointing: of a decoder block only its input is kept until its gradient is wanted.

What lies inside is then computed again, through the same routes and with the same masks, so the
gradients have the same bits. Blocks below the lowest adapter have no gradient and are left alone.

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
    """Lets ``blocks`` keep nothing but their input in passes inside the block.

    Args:
        blocks: Decoder layers.
        router: Of their adapted layers; what they follow now, they follow again.
    """
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, router)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputed(forward: Callable[..., Any], router: Router, *args: Any, **kwargs: Any) -> Any:
    routes = router.routes
    assert routes is not None, "a pass that trains follows routes"

    def again(*args: Any, **kwargs: Any) -> Any:
        # The second time the pass is over, and nothing is followed any more.
        with router.following(routes):
            return forward(*args, **kwargs)

    # Masks are functions of their names and nothing else is drawn, so no state is put back.
    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
