"""The frozen trunk of all runs on one base: whether states are kept, where, and what that took.

The decision is made here, for a run by itself, so that the cost of an arm does not depend on what
it trains with. `SharedBase` owns the `Trunk`; a `PreparedRun` knows the layer that its steps begin
at.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import psutil

from loracle.config.run import Config
from loracle.data import Example
from loracle.digest import code_digest, key_of
from loracle.engine.schedule import DataOrder
from loracle.model.base import FrozenBase
from loracle.model.identity import BaseIdentity, inputs_of
from loracle.model.trunk import TrunkStore, lowest_layer
from loracle.placement import ModulePlan
from loracle.runner.progress import Progress
from loracle.runner.signals import StopRequest
from loracle.sources.cache import cache_folder
from loracle.text import GIB

TRUNK_SOURCES = ("data/**/*.py", "model/**/*.py")

# assumed: computing a state alone costs more than in a row, and keeping it costs too
_USES_THAT_PAY = 2.0
# assumed: the other half is for the run itself
_TRUNK_MEMORY_FRAC = 0.5
# assumed: a cache that takes a quarter of the free disk is in nobody's way
_TRUNK_DISK_FRAC = 0.25


def trunk_layer(
    plan: ModulePlan, *, config: Config, base: FrozenBase, num_train: int, num_scored: int
) -> int:
    """Returns the layer that a run's steps should begin at; 0: at the tokens.

    It pays to keep states if the run uses those of its examples often enough.

    Args:
        plan: Its modules.
        config: Its configuration.
        base: The frozen model.
        num_train: Training examples.
        num_scored: Examples of one validation.
    """
    if config.train.trunk == "off" or not base.has_trunk:
        return 0
    trained = config.train.max_steps * config.train.batch_size
    uses = trained + config.num_validations * num_scored
    distinct = min(trained, num_train) + num_scored
    return lowest_layer(plan, base=base) if uses >= _USES_THAT_PAY * distinct else 0


def examples_seen(config: Config, *, train: Sequence[Example], steps: int) -> list[Example]:
    """Returns every example of a run's first steps once, in the order of the training set."""
    order = DataOrder(train, batch_size=config.train.batch_size, seed=config.seed)
    seen = {id(example) for step in range(steps) for example in order.batch(step)}
    return [example for example in train if id(example) in seen]


@dataclass
class TrunkUse:
    """Cost of keeping the states that enter one layer, for all runs that share them."""

    layer: int
    """First decoder layer that is computed in a step."""
    kept_gib: float = 0.0
    """Size of the states."""
    fill_time_s: float | None = None
    """Time to compute them once; null: they were on the disk."""
    filled: set[tuple[int, ...]] = field(default_factory=set, repr=False)
    """Token ids of the examples whose states are kept."""


@dataclass
class Trunk:
    """Hidden states below the lowest adapters, and what keeping them took."""

    base: FrozenBase
    store: TrunkStore
    uses: dict[int, TrunkUse] = field(default_factory=dict)
    """By the layer that the states enter."""

    def fill(
        self, examples: Sequence[Example], *, layer: int, progress: Progress, stop: StopRequest
    ) -> None:
        """Computes the states that enter ``layer`` where they are not kept yet."""
        use = self.uses.setdefault(layer, TrunkUse(layer))
        missing = [example for example in examples if example.input_ids not in use.filled]
        if not missing:
            return
        computed_before, started_at = self.store.computed, time.perf_counter()
        with progress.phase(f"states below layer {layer}", total=len(missing)) as advance:
            for example in missing:
                self.store.states([example], layer=layer)
                use.filled.add(example.input_ids)
                stop.check()
                advance(1)
        use.kept_gib += _state_bytes(self.base, missing) / GIB
        if self.store.computed > computed_before:
            use.fill_time_s = (use.fill_time_s or 0.0) + time.perf_counter() - started_at


@cache
def trunk_digest() -> str:
    """Returns a digest of the code that computes states, taken once per process."""
    return code_digest(TRUNK_SOURCES)


def state_key(layer: int, *, identity: BaseIdentity, environment: Mapping[str, Any]) -> str:
    """Returns the key of the states that enter a layer of the base; each lies under its tokens."""
    return key_of(
        "states",
        inputs_of(
            identity,
            environment=environment,
            code=trunk_digest(),
            asked={"layer": layer},
        ),
    )


def open_trunk(
    base: FrozenBase,
    examples: Sequence[Example],
    *,
    num_layers: int,
    identity: BaseIdentity,
    environment: Mapping[str, Any],
) -> Trunk | None:
    """Returns an empty trunk for the states of these examples that enter ``num_layers`` layers.

    In memory, or on disk if memory cannot hold them; None if neither can, or there is no layer.
    """
    if num_layers == 0:
        return None
    room_bytes = int(_TRUNK_MEMORY_FRAC * psutil.virtual_memory().available)
    needed_bytes = num_layers * _state_bytes(base, examples)
    folder = cache_folder() / "trunk" if needed_bytes > room_bytes else None
    if folder is not None:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if needed_bytes > _TRUNK_DISK_FRAC * shutil.disk_usage(existing).free:
            return None
    key = partial(state_key, identity=identity, environment=environment)
    store = TrunkStore(base, folder=folder, key=key, memory_bytes=room_bytes)
    return Trunk(base, store)


def _state_bytes(base: FrozenBase, examples: Iterable[Example]) -> int:
    """Returns the bytes that the hidden states of the distinct examples take at one layer."""
    width = int(base.model.config.get_text_config().hidden_size)
    distinct = {tuple(example.input_ids) for example in examples}
    return sum(map(len, distinct)) * width * base.dtype.itemsize
