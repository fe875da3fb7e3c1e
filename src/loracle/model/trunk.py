"""The frozen trunk: hidden states below the lowest adapter, computed once for each example.

They depend on the example alone, so runs, seeds, epochs and evaluations share them. By definition
the states of an example are those computed with it alone in its row: the bits of a matrix product
may depend on the number of its rows, and a kept state must equal a fresh one whatever shares the
row later.

Shapes: T tokens in the row, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from loracle.data.packing import Tokens, to_device
from loracle.digest import code_digest
from loracle.model.base import FrozenBase
from loracle.model.blocks import Trunk
from loracle.model.shards import Shards
from loracle.placement import ModulePlan

TRUNK_SOURCES = ("data/**/*.py", "model/**/*.py")


def lowest_layer(plan: ModulePlan | None, *, base: FrozenBase) -> int:
    """Returns the first decoder layer that ``plan`` adapts: below it every run is the base.

    Args:
        plan: The adapter's modules; None: the base alone.
        base: The model they belong to.

    Returns:
        An index from 0; the number of layers if at most the output head is adapted; 0 if a module
        stands elsewhere (a projection between embedding and layers, say), or all weights train.
    """
    if plan is not None and plan.is_full:
        return 0
    head = base.model.get_output_embeddings()
    lowest = len(base.blocks)
    for planned in plan.modules if plan is not None else ():
        inside = planned.name.startswith(f"{base.blocks_name}.") and planned.layer is not None
        if inside:
            assert planned.layer is not None
            lowest = min(lowest, planned.layer)
        elif base.model.get_submodule(planned.name) is not head:
            return 0
    return lowest


class TrunkStore:
    """Hidden states of examples, kept in memory and on disk, computed where neither has them."""

    def __init__(
        self, base: FrozenBase, *, weights_digest: str, folder: Path | None, memory_bytes: int
    ) -> None:
        """Opens the store; nothing is read or written yet.

        Args:
            base: The frozen model.
            weights_digest: ``base.weights_digest()``, which costs a second or more to take.
            folder: Where states outlast the process and are shared with others; None: nowhere.
            memory_bytes: Host memory for states; the first that come are kept until it is full.
        """
        self.hits = 0
        """States that were found, in memory or on disk."""
        self.computed = 0
        """States that had to be computed."""
        self._base = base
        self._folder = folder
        self._origin = {"weights": weights_digest} | _origin_of(base)
        self._room_bytes = memory_bytes
        self._kept: dict[tuple[int, bytes], Tensor] = {}
        self._shards: dict[int, Shards] = {}

    def states(self, examples: Sequence[Tokens], *, layer: int) -> Trunk:
        """Returns what enters ``layer`` for the examples, end to end in their order.

        Computing a state that is not kept waits for the device; finding one does not.

        Args:
            examples: The sequences of a row.
            layer: From 1 up to the number of decoder layers.
        """
        keys = [_key_of(example) for example in examples]
        by_key = dict(zip(keys, examples, strict=True))
        found = {key: self._find(key, each, layer=layer) for key, each in by_key.items()}
        fresh = self._compute(
            {key: by_key[key] for key, states in found.items() if states is None}, layer=layer
        )
        self.computed += len(fresh)
        self.hits += len(examples) - len(fresh)
        known = {key: states for key, states in found.items() if states is not None} | fresh
        # A copy even of one: what an evaluation computed in inference mode serves training too.
        row = torch.cat([known[key] for key in keys])
        return Trunk(layer, to_device(row, device=self._base.device))

    def _find(self, key: bytes, example: Tokens, *, layer: int) -> Tensor | None:
        kept = self._kept.get((layer, key))
        if kept is not None or self._folder is None:
            return kept
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
        alone = [self._base.states_entering(layer, example=each) for each in examples.values()]
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
        if size <= self._room_bytes:
            self._room_bytes -= size
            self._kept[layer, key] = states.clone()

    def _shards_of(self, layer: int) -> Shards:
        assert self._folder is not None
        if layer not in self._shards:
            origin = json.dumps(self._origin | {"layer": layer}, sort_keys=True)
            name = hashlib.sha256(origin.encode()).hexdigest()
            self._shards[layer] = Shards(self._folder / name)
        return self._shards[layer]


def _key_of(example: Tokens) -> bytes:
    ids = torch.as_tensor(example.input_ids, dtype=torch.int64)
    return hashlib.sha256(ids.numpy().tobytes()).digest()


def _origin_of(base: FrozenBase) -> dict[str, object]:
    """Returns all that the bits of a state depend on besides weights, layer and tokens."""
    cuda = base.device.type == "cuda"
    config = base.model.config.to_dict()
    return {
        "dtype": str(base.dtype),
        "config": {k: str(v) for k, v in config.items() if not k.startswith("_")},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "source": _source_digest(),
        "device": torch.cuda.get_device_name(base.device)
        if cuda
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def _source_digest() -> str:
    """Returns a digest of the code that computes, so that edited code reads no old states."""
    return code_digest(TRUNK_SOURCES)
