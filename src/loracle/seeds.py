"""Named random streams from one seed.

Every random draw of a run comes from a stream named after its purpose, never from a shared
generator, so no draw depends on earlier ones. Therefore runs are resumable (a stream is a function
of its name, without state to save), arms are comparable (a module that two placements share starts
from the same A), and bundles are exact (a run draws the same alone or beside others).

Streams: ``split`` (by its own seed), ``order`` per epoch, ``init`` per module, ``dropout`` per
(step, module, slot), ``sample`` for anything drawn at evaluation.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_seed(seed: int, *name: str | int) -> int:
    """Returns a 63-bit seed for the stream ``name`` of ``seed``.

    A hash rather than ``seed + k``, so that neighbouring seeds and names are independent. A name
    is the stream's purpose, e.g. ``("init", "model.layers.0.self_attn.q_proj")``.
    """
    key = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in name)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_stream(seed: int, *name: str | int) -> np.random.Generator:
    """Returns a NumPy generator for the stream ``name`` of ``seed``."""
    return np.random.Generator(np.random.Philox(key=stream_seed(seed, *name)))
