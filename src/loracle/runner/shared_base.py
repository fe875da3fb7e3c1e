"""What all runs on one base share: base, data, and results of the untuned model.

Loaded, tokenised and scored once, however many runs there are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loracle.config.bleu import Choice, choose_tokenizer
from loracle.config.run import Config, TrainConfig
from loracle.data import Example, PreparedData, prepare_data
from loracle.engine.answers import Answer
from loracle.engine.device import choose_device, choose_dtype, dtype_name
from loracle.engine.environment import capture_environment
from loracle.engine.evaluate import ExampleScore
from loracle.engine.measure import MemoryMeter
from loracle.engine.out_of_memory import memory_faults
from loracle.engine.train_state import TrainState, new_run
from loracle.model.adapters import attach_adapter
from loracle.model.base import FrozenBase
from loracle.model.identity import BaseIdentity, identify
from loracle.model.load import load_base
from loracle.model.whole import whole_model
from loracle.placement import ModulePlan
from loracle.runner.progress import Advance, Progress
from loracle.runner.same_inputs import base_record, held_out_digest
from loracle.runner.signals import StopRequest
from loracle.runner.trunk import Trunk, open_trunk, trunk_layer
from loracle.runner.untuned_cache import Untuned, UntunedCache, untuned_cache_folder
from loracle.runner.usable import require_usable
from loracle.sources import ResolvedSource, resolve_data, resolve_model

_SMALLER_BASE = "its weights do not fit; `loracle plan` says what does, and quantization=nf4 helps"


@dataclass
class SharedBase:
    """One loaded base and what every run on it uses."""

    config: Config
    """Configuration of one of the runs; all agree on model, data, evaluation and measurement."""
    progress: Progress
    stop: StopRequest
    model: ResolvedSource
    base: FrozenBase
    data: PreparedData
    environment: dict[str, Any]
    identity: BaseIdentity
    loading: MemoryMeter
    """Peak memory of loading the base."""
    cache: UntunedCache
    trunk: Trunk | None = None
    """Kept states below the lowest adapters; None: every run begins at the tokens."""
    untuned_scores: Untuned[ExampleScore] | None = None
    untuned_answers: Untuned[Answer] | None = None
    """None until first needed, as ``untuned_scores``."""

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

    @cached_property
    def bleu(self) -> Choice:
        """BLEU's tokenizer, one for all runs, since all answer the same instructions."""
        references = [example.record.output for example in self.answered]
        return choose_tokenizer(references, asked=self.config.eval.bleu_tokenize)

    def meter(self) -> MemoryMeter:
        """Returns a meter that holds the peaks of loading only."""
        loaded = self.loading
        return MemoryMeter(loaded.device, dict(loaded.peaks_gib), dict(loaded.reserved_gib))

    def stopping(self, advance: Advance) -> Callable[[int], None]:
        """Returns ``advance`` that also honours a stop request, where the state is whole."""

        def progress(count: int) -> None:
            self.stop.check()
            advance(count)

        return progress

    def new_run(
        self, config: Config, *, plan: ModulePlan, name: str, train: TrainConfig | None = None
    ) -> TrainState:
        """Returns the state of a run at step 0, with a new adapter of that name on the base.

        ``train`` replaces ``config.train``.
        """
        if plan.is_full:
            trained = whole_model(self.base, name=name, plan=plan)
        else:
            source, revision = self.model.stock_name
            trained = attach_adapter(
                self.base,
                name=name,
                plan=plan,
                dropout=config.lora.dropout,
                seed=config.seed,
                model_source=source,
                revision=revision,
            )
        return new_run(
            self.base,
            adapter=trained,
            examples=self.data.train,
            train=train or config.train,
            dropout=config.lora.dropout,
            seed=config.seed,
        )

    def open_trunk(self, runs: Sequence[tuple[Config, ModulePlan]]) -> list[int]:
        """Opens the trunk if a run gains from it; returns the layer that each run begins at.

        0 is a run that begins at the tokens; all do if the states fit nowhere.
        """
        layers = [
            trunk_layer(
                plan,
                config=config,
                base=self.base,
                num_train=len(self.data.train),
                num_scored=len(self.scored),
            )
            for config, plan in runs
        ]
        self.trunk = open_trunk(
            self.base,
            [*self.data.train, *self.data.validation],
            num_layers=len({*layers} - {0}),
            identity=self.identity,
            environment=self.environment,
        )
        return layers if self.trunk else [0] * len(layers)

    def fill_trunk(self, examples: Sequence[Example], *, layers: Sequence[int]) -> None:
        """Computes the states of these examples that enter each layer, if any is above 0."""
        for layer in sorted({*layers} - {0}):
            assert self.trunk is not None
            self.trunk.fill(examples, layer=layer, progress=self.progress, stop=self.stop)

    def thaw(self) -> None:
        """Frees the frozen weights and loads them anew, all to be trained.

        Every full fine-tuning begins with this. The scores and answers of the untuned model must
        be computed by then: there is no frozen base any more that could give them.
        """
        frozen = self.base
        self.trunk = None
        # Not two models at a time: the old one's memory goes first.
        frozen.release()
        self.loading = MemoryMeter(frozen.device)
        with self.loading.phase("load"):
            self.base = load_base(
                self.model.path, device=frozen.device, dtype=frozen.dtype, trains=True
            )

    def clear(self) -> None:
        """Takes every adapter off the base, which is then as it was loaded."""
        if self.base.peft is not None:
            self.base.peft.unload()
            self.base.peft = None
            # PEFT's view of the model refers to itself; the adapters go when it does.
            gc.collect()


def open_shared_base(config: Config, *, progress: Progress, stop: StopRequest) -> SharedBase:
    """Resolves the sources, loads the base and tokenises the data.

    Raises:
        UsageError: If the model or the data cannot be had or used as requested.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device)
    memory = MemoryMeter(device)
    model = resolve_model(config.model, progress=progress.notice)
    source = resolve_data(config.data.source, progress=progress.notice)
    stop.check()
    with memory.phase("load"), memory_faults(config.model, remedy=_SMALLER_BASE):
        base = load_base(model.path, device=device, dtype=dtype, quantization=config.quantization)
    data = prepare_data(source, config=config.data, tokenizer=base.tokenizer, end_ids=base.end_ids)
    for line in (*base.notices, *data.notices):
        progress.notice(line)
    require_usable(base, data=data, config=config)
    identity = identify(base, folder=model.path, weights_digest=base.weights_digest())
    record = base_record(identity, revision=model.revision, device=device.type)
    environment = capture_environment(
        device=str(device), dtype=dtype_name(dtype), quantization=config.quantization
    )
    shared = SharedBase(
        config=config,
        progress=progress,
        stop=stop,
        model=model,
        base=base,
        data=data,
        environment={**environment, "base": record, "held_out_sha256": held_out_digest(data)},
        identity=identity,
        loading=memory,
        cache=UntunedCache(untuned_cache_folder(), notice=progress.notice),
    )
    if shared.answered and shared.bleu.note is not None:
        progress.notice(shared.bleu.note)
    return shared
