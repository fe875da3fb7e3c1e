"""One seed, many named streams.

Every random draw of a run comes from a stream that is named by what it is for, never from a shared
generator, so a draw does not depend on what else was drawn before it. That is what makes runs
resumable (a stream is a function of its name, there is no state to save), arms comparable (a module
that two placements share starts from the same A) and bundles exact (a run draws the same alone or
beside others).

Streams: ``split`` (by its own seed), ``order`` per epoch, ``init`` per module, ``dropout`` per
(step, module, slot), ``sample`` for anything drawn at evaluation.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_seed(seed: int, *name: str | int) -> int:
    """Returns a 63-bit seed for the stream ``name`` of ``seed``.

    A hash rather than ``seed + k``: neighbouring seeds and neighbouring names share nothing.

    Args:
        seed: The run's seed.
        name: What the stream is for, e.g. ``("init", "model.layers.0.self_attn.q_proj")``.
    """
    key = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in name)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_stream(seed: int, *name: str | int) -> np.random.Generator:
    """Returns a NumPy generator for the stream ``name`` of ``seed``."""
    return np.random.Generator(np.random.Philox(key=stream_seed(seed, *name)))
