"""When hidden states below the lowest adapter are kept, and computing them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from loracle.config.run import Config, num_probed_steps
from loracle.data import Example
from loracle.engine.schedule import DataOrder
from loracle.model.base import FrozenBase
from loracle.model.trunk import TrunkStore
from loracle.runner.shared_base import TrunkUse, Workbench
from loracle.sources.cache import cache_folder
from loracle.text import GIB

# assumed: computing a state alone costs more than in a row, and keeping it costs too
_USES_THAT_PAY = 2.0


def trunk_pays(bench: Workbench, config: Config) -> bool:
    """Returns whether a run uses the states of its examples often enough to keep them.

    Asked of the run alone, so that what an arm costs does not depend on what it trains with.
    """
    if config.train.trunk == "off":
        return False
    taken = config.train.max_steps * config.train.batch_size
    scored = len(bench.scored)
    distinct = min(taken, len(bench.data.train)) + scored
    return taken + config.num_validations * scored >= _USES_THAT_PAY * distinct


def examples_seen(bench: Workbench, config: Config) -> list[Example]:
    """Returns every example that the run, or its probe, trains or is scored on, once."""
    order = DataOrder(bench.data.train, batch_size=config.train.batch_size, seed=config.seed)
    steps = max(config.train.max_steps, num_probed_steps(config))
    seen = {id(one): one for step in range(steps) for one in order.batch(step)}
    return [one for one in bench.data.train if id(one) in seen] + list(bench.scored)


# assumed: the other half is for the run itself
_TRUNK_MEMORY_FRAC = 0.5


# assumed: a cache that takes a quarter of what is free is in nobody's way
_TRUNK_DISK_FRAC = 0.25


def open_trunk(bench: Workbench, *, num_layers: int) -> None:
    """Opens the store of hidden states; leaves None where they do not fit, as that would not pay.

    In memory, or on disk if memory does not hold them.

    Args:
        bench: Gets the store.
        num_layers: Layers that runs begin from.
    """
    room_bytes = int(_TRUNK_MEMORY_FRAC * psutil.virtual_memory().available)
    examples = [*bench.data.train, *bench.data.validation]
    needed_bytes = num_layers * state_bytes(bench.base, examples)
    folder = cache_folder() / "trunk" if needed_bytes > room_bytes else None
    if folder is not None and needed_bytes > _TRUNK_DISK_FRAC * _free_disk_bytes(folder):
        return
    bench.trunk = TrunkStore(
        bench.base, weights_digest=bench.weights_digest, folder=folder, memory_bytes=room_bytes
    )


def _free_disk_bytes(folder: Path) -> int:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def state_bytes(base: FrozenBase, examples: Iterable[Example]) -> int:
    """Returns the bytes that the hidden states of ``examples`` take at one layer."""
    width = int(base.model.config.get_text_config().hidden_size)
    unlike = {tuple(example.input_ids) for example in examples}
    return sum(map(len, unlike)) * width * base.dtype.itemsize


def fill_trunk(bench: Workbench, examples: Sequence[Example], *, layer: int) -> None:
    """Computes the states that enter ``layer`` where they are not kept yet."""
    store, use = bench.trunk, bench.trunk_uses.setdefault(layer, TrunkUse(layer))
    assert store is not None
    missing = [example for example in examples if example.input_ids not in use.filled]
    if not missing:
        return
    before, began = store.computed, time.perf_counter()
    with bench.screen.phase(f"states below layer {layer}", total=len(missing)) as advance:
        for example in missing:
            store.states([example], layer=layer)
            use.filled.add(example.input_ids)
            bench.stopping(advance)(1)
    use.kept_gib += state_bytes(bench.base, missing) / GIB
    if store.computed > before:
        use.fill_time_s = (use.fill_time_s or 0.0) + time.perf_counter() - began
