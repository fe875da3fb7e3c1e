"""The frozen trunk: hidden states below the lowest adapter, computed once for each example.

They depend on the example alone, so runs, seeds, epochs and evaluations share them. The states of
an example are computed with it alone in its row: the bits of a matrix product may depend on the
number of its rows, and a cached state must equal a fresh one whatever shares the row later.

Shapes: T tokens in the row, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loracle.data.packing import Tokens, to_device
from loracle.model.base import FrozenBase
from loracle.model.blocks import Trunk
from loracle.model.shards import Shards
from loracle.placement import ModulePlan


def lowest_layer(plan: ModulePlan | None, *, base: FrozenBase) -> int:
    """Returns the index of the first decoder layer that ``plan`` adapts; the base lies below it.

    The number of layers if at most the output head is adapted, as without a plan; 0 if a module
    lies elsewhere (e.g. a projection between embedding and layers), or all weights train.
    """
    if plan is not None and plan.is_full:
        return 0
    head = base.model.get_output_embeddings()
    lowest = len(base.blocks)
    for planned in plan.modules if plan is not None else ():
        if planned.layer is not None and planned.name.startswith(f"{base.blocks_name}."):
            lowest = min(lowest, planned.layer)
        elif base.model.get_submodule(planned.name) is not head:
            return 0
    return lowest


class TrunkStore:
    """Hidden states of examples, cached in memory and on disk, computed where missing."""

    def __init__(
        self,
        base: FrozenBase,
        *,
        memory_bytes: int,
        folder: Path | None = None,
        key: Callable[[int], str] | None = None,
    ) -> None:
        """Opens the store; nothing is read or written yet.

        Args:
            base: The frozen model.
            memory_bytes: Host memory for states; the first ones are cached until it is full.
            folder: Disk cache, shared between processes; None: none.
            key: With a folder, the key under which the states that enter a layer are kept there.
        """
        assert folder is None or key is not None, "states on disk need a key"
        self.hits = 0
        """States that were found, in memory or on disk."""
        self.computed = 0
        """States that had to be computed."""
        self._base = base
        self._folder = folder
        self._key = key
        self._free_bytes = memory_bytes
        self._cached: dict[tuple[int, bytes], Tensor] = {}
        self._shards: dict[int, Shards] = {}

    def states(self, examples: Sequence[Tokens], *, layer: int) -> Trunk:
        """Returns the input of ``layer`` (from 1) for the examples of a row, in their order.

        Computing a missing state waits for the device; finding a cached one does not.
        """
        keys = [_key_of(example) for example in examples]
        by_key = dict(zip(keys, examples, strict=True))
        found = {key: self._find(key, example, layer=layer) for key, example in by_key.items()}
        cached = {key: states for key, states in found.items() if states is not None}
        missing = {key: example for key, example in by_key.items() if key not in cached}
        computed = self._compute(missing, layer=layer)
        self.computed += len(computed)
        self.hits += len(examples) - len(computed)
        # Copied even if it is a single one: states computed in inference mode also serve training.
        states = cached | computed
        row = torch.cat([states[key] for key in keys])
        return Trunk(layer, to_device(row, device=self._base.device))

    def _find(self, key: bytes, example: Tokens, *, layer: int) -> Tensor | None:
        cached = self._cached.get((layer, key))
        if cached is not None or self._folder is None:
            return cached
        content = self._shards_of(layer).read(key)
        if content is None:
            return None
        flat = torch.frombuffer(content, dtype=self._base.dtype)
        states = flat.view(len(example.input_ids), -1)
        self._keep(key, states, layer=layer)
        return states

    def _compute(self, examples: dict[bytes, Tokens], *, layer: int) -> dict[bytes, Tensor]:
        if not examples:
            return {}
        alone = [self._base.states_entering(layer, example=e) for e in examples.values()]
        lengths = [len(states) for states in alone]
        computed = dict(zip(examples, torch.cat(alone).cpu().split(lengths), strict=True))
        for key, states in computed.items():
            self._keep(key, states, layer=layer)
            if self._folder is not None:
                bits = states.contiguous().view(torch.uint8).numpy().tobytes()
                self._shards_of(layer).append(key, bits)
        return computed

    def _keep(self, key: bytes, states: Tensor, *, layer: int) -> None:
        size = states.numel() * states.element_size()
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._cached[layer, key] = states.clone()

    def _shards_of(self, layer: int) -> Shards:
        assert self._folder is not None
        assert self._key is not None
        if layer not in self._shards:
            self._shards[layer] = Shards(self._folder / self._key(layer))
        return self._shards[layer]


def _key_of(example: Tokens) -> bytes:
    ids = torch.as_tensor(example.input_ids, dtype=torch.int64)
    return hashlib.sha256(ids.numpy().tobytes()).digest()
