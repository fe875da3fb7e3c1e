"""What all runs on one base share: the base, the data, and what is known of the untuned model.

Loaded, tokenised and scored once, however many runs there are.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from loracle.config import Config, TrainConfig
from loracle.data import Example, PreparedData, prepare_data
from loracle.device import choose_device, choose_dtype, dtype_name
from loracle.environment import capture_environment
from loracle.evaluate import Answer, ExampleScore
from loracle.known import Known, known_folder
from loracle.measure import MemoryMeter
from loracle.memory_limit import memory_faults
from loracle.model.adapters import attach_adapter
from loracle.model.base import FrozenBase
from loracle.model.load import load_base
from loracle.model.trunk import TrunkStore
from loracle.model.whole import whole_model
from loracle.placement import ModulePlan
from loracle.screen import Advance, Screen
from loracle.signals import StopRequest
from loracle.sources import ResolvedSource, resolve_data, resolve_model
from loracle.sources.cache import cache_folder
from loracle.training_run import TrainingRun, new_run
from loracle.words import GIB

# assumed: the other half is for the run itself
_TRUNK_MEMORY_FRAC = 0.5
# assumed: a cache that takes a quarter of what is free is in nobody's way
_TRUNK_DISK_FRAC = 0.25
_SMALLER_BASE = "its weights do not fit; `loracle plan` says what does, and quantization=nf4 helps"


@dataclass
class TrunkUse:
    """What the kept states that enter one layer took, for all runs that share them."""

    layer: int
    """First decoder layer that is computed in a step."""
    kept_gib: float = 0.0
    """Their size."""
    fill_time_s: float | None = None
    """Time to compute them once; null: they were on the disk."""
    filled: set[tuple[int, ...]] = field(default_factory=set, repr=False)
    """Token ids of the examples whose states are kept."""

    def to_json(self) -> dict[str, Any]:
        """Returns it as a run's result states it."""
        return {
            "layer": self.layer,
            "kept_gib": self.kept_gib,
            "fill_time_s": self.fill_time_s,
        }


@dataclass
class Workbench:
    """One loaded base and what every run on it uses."""

    config: Config
    """Of one of the runs; they agree on model, data, evaluation and measurement."""
    screen: Screen
    stop: StopRequest
    model: ResolvedSource
    base: FrozenBase
    data: PreparedData
    environment: dict[str, Any]
    weights_digest: str
    loading: MemoryMeter
    """Peak memory of loading the base."""
    known: Known
    trunk: TrunkStore | None = None
    """Hidden states below the lowest adapters; None: no run begins from them."""
    trunk_uses: dict[int, TrunkUse] = field(default_factory=dict)
    """What the states below each layer took, so far."""
    untuned_scores: tuple[list[ExampleScore], bool] | None = None
    """The untuned base's, and whether they were known before; None: not asked for yet."""
    untuned_answers: tuple[list[Answer], bool] | None = None
    """The untuned base's, and whether they were known before; None: not asked for yet."""

    @property
    def scored(self) -> Sequence[Example]:
        """The validation examples that are scored."""
        return self.data.validation[: self.config.eval.max_examples]

    @property
    def answered(self) -> Sequence[Example]:
        """The validation examples whose instruction is answered."""
        return self.data.validation[: self.config.eval.generate_examples]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of the instructions that are answered."""
        return [example.input_ids[: example.num_prompt] for example in self.answered]

    def meter(self) -> MemoryMeter:
        """Returns a meter that knows of nothing but loading."""
        loaded = self.loading
        return MemoryMeter(loaded.device, dict(loaded.peaks_gib), dict(loaded.reserved_gib))

    def stopping(self, advance: Advance) -> Callable[[int], None]:
        """Returns ``advance`` that also stops where the state is whole."""

        def progress(count: int) -> None:
            self.stop.check()
            advance(count)

        return progress

    def new_run(
        self, config: Config, *, plan: ModulePlan, name: str, train: TrainConfig | None = None
    ) -> TrainingRun:
        """Returns a run at step 0, its new adapter on the base.

        Args:
            config: The run's configuration.
            plan: The modules that its placement comes to.
            name: Of the adapter on the base.
            train: In place of ``config.train``; None: that.
        """
        lora = config.lora
        if plan.is_full:
            trained = whole_model(self.base, name=name, plan=plan)
        else:
            trained = attach_adapter(
                self.base,
                name=name,
                plan=plan,
                dropout=lora.dropout,
                seed=config.seed,
                model_source=self.model.source,
            )
        return new_run(
            self.base,
            adapter=trained,
            examples=self.data.train,
            train=train or config.train,
            dropout=lora.dropout,
            seed=config.seed,
        )

    def thaw(self) -> None:
        """Loads the weights anew, all to be trained; what was loaded before is let go.

        Every full fine-tuning begins with this. The scores and answers of the untuned model must
        be known by then: there is no frozen base any more that could give them.
        """
        before = self.base
        self.trunk = None
        # Not two models at a time: the old one's memory goes first.
        before.model.to_empty(device=torch.device("meta"))
        self.loading = MemoryMeter(before.device)
        with self.loading.phase("load"):
            self.base = load_base(
                self.model.path, device=before.device, dtype=before.dtype, trains=True
            )

    def clear(self) -> None:
        """Takes every adapter off the base, which is then as it was loaded."""
        if self.base.peft is not None:
            self.base.peft.unload()
            self.base.peft = None
            # PEFT's view of the model refers to itself; the adapters go when it does.
            gc.collect()


def open_workbench(config: Config, *, screen: Screen, stop: StopRequest) -> Workbench:
    """Resolves the sources, loads the base and tokenises the data.

    Raises:
        UsageError: If the model or the data cannot be had or used as asked.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device)
    memory = MemoryMeter(device)
    model = resolve_model(config.model, progress=screen.notice)
    source = resolve_data(config.data.source, progress=screen.notice)
    stop.check()
    with memory.phase("load"), memory_faults(config.model, remedy=_SMALLER_BASE):
        base = load_base(model.path, device=device, dtype=dtype, quantization=config.quantization)
    data = prepare_data(source, config=config.data, tokenizer=base.tokenizer)
    digest = base.weights_digest()
    return Workbench(
        config=config,
        screen=screen,
        stop=stop,
        model=model,
        base=base,
        data=data,
        environment=capture_environment(
            device=str(device), dtype=dtype_name(dtype), quantization=config.quantization
        ),
        weights_digest=digest,
        loading=memory,
        known=Known(known_folder(), notice=screen.notice),
    )


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
