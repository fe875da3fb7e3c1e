"""What all runs on one base share: the base, the data, and what is known of the untuned model.

Loaded, tokenised and scored once, however many runs there are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loracle.config.run import Config, TrainConfig
from loracle.data import Example, PreparedData, prepare_data
from loracle.engine.device import choose_device, choose_dtype, dtype_name
from loracle.engine.environment import capture_environment
from loracle.engine.evaluate import Answer, ExampleScore
from loracle.engine.measure import MemoryMeter
from loracle.engine.out_of_memory import memory_faults
from loracle.engine.train_state import TrainingRun, new_run
from loracle.model.adapters import attach_adapter
from loracle.model.base import FrozenBase
from loracle.model.load import load_base
from loracle.model.trunk import TrunkStore
from loracle.model.whole import whole_model
from loracle.placement import ModulePlan
from loracle.runner.progress import Advance, Screen
from loracle.runner.signals import StopRequest
from loracle.runner.untuned_cache import Known, known_folder
from loracle.sources import ResolvedSource, resolve_data, resolve_model

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
