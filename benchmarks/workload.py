"""The work of every contender: the same model, data, batches and initial adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import loracle
from geometry import bare_tokenizer, random_base, random_examples, random_model
from loracle.config.run import Config
from loracle.data import Example, PreparedData
from loracle.engine.schedule import DataOrder
from loracle.engine.train_state import TrainState
from loracle.model.adapters import initial_a
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.placement import ModulePlan
from loracle.records.signature import without_folder
from loracle.screen import quiet_transformers

Batch = list[Example]

# source: get_length_grouped_indices, transformers@v5.23.0 trainer_pt_utils.py
_MEGABATCH = 50


@dataclass(frozen=True)
class Workload:
    """One block of work: a few optimizer steps, the first one a warm-up."""

    config: Config
    folder: Path
    """The model, as stock Transformers loads it."""
    batches: tuple[Batch, ...]
    """The examples of each optimizer step, the warm-up first."""
    device: torch.device
    dtype: torch.dtype
    """dtype of the frozen base in our loop and in the hand-written one."""
    geometry: str | None = None
    """A published shape with random weights, instead of the model in ``folder``."""
    packing: str | None = None
    """``nf4``: they are packed in 4 bits."""


@dataclass(frozen=True)
class Source:
    """Model and data, resolved and tokenised."""

    config: Config
    folder: Path
    data: PreparedData

    def order(self) -> DataOrder[Example]:
        """Returns the data order of the run's seed."""
        config = self.config
        return DataOrder(self.data.train, batch_size=config.train.batch_size, seed=config.seed)


def open_source(overrides: Sequence[str]) -> Source:
    """Returns the standard baseline's model and data, with ``key=value`` overrides."""
    config = config_of("train.max_steps=60", *overrides)
    model = loracle.resolve_model(config.model, progress=_to_stderr)
    source = loracle.resolve_data(config.data.source, progress=_to_stderr)
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    data = loracle.prepare_data(source, config=config.data, tokenizer=tokenizer)
    return Source(config=config, folder=model.path, data=data)


def config_of(*overrides: str) -> Config:
    """Returns the standard baseline's configuration without warm-up, with overrides."""
    return loracle.load_config("base_config", overrides=["train.warmup_frac=0.0", *overrides])


def _to_stderr(line: object) -> None:
    print(line, file=sys.stderr)


def settings_of(source: Source) -> dict[str, Any]:
    """Returns the whole configuration as plain data, local sources without their folders."""
    settings = source.config.model_dump(mode="json")
    settings["model"] = without_folder(settings["model"])
    settings["data"]["source"] = without_folder(settings["data"]["source"])
    return settings


def workload_of(source: Source, batches: Iterable[Batch]) -> Workload:
    """Returns a block of these batches, on the device the config names."""
    return _workload(source.config, batches, folder=source.folder)


def _workload(config: Config, batches: Iterable[Batch], **model: Any) -> Workload:
    device = loracle.choose_device(config.device)
    dtype = loracle.choose_dtype(config.dtype, device=device)
    return Workload(config=config, batches=tuple(batches), device=device, dtype=dtype, **model)


def random_batches(source: Source, *, part: int, num_steps: int) -> list[Batch]:
    """Returns a warm-up and ``num_steps`` batches in the run's own order; parts do not overlap."""
    order, first = source.order(), part * (num_steps + 1)
    return [order.batch(step) for step in range(first, first + num_steps + 1)]


def grouped_batches(source: Source, *, part: int, num_parts: int, num_steps: int) -> list[Batch]:
    """Returns batches as ``group_by_length`` makes them, a systematic sample of one epoch.

    A block has a few batches only, and a length-grouped batch is all short or all long. So the
    epoch's batches are sorted by their tokens and taken at equal distances: every part has some of
    every length, and all parts together represent an epoch. Lengths, and so seconds per step,
    differ from the other contenders'; seconds per real token are comparable.
    """
    size = source.config.train.batch_size
    batches = _length_grouped(source.data.train, batch_size=size, seed=source.config.seed)
    ordered = sorted(batches, key=lambda batch: -counts_of(batch)["num_tokens"])
    count = num_parts * num_steps
    ranks = [
        int((step * num_parts + part + 0.5) * len(ordered) / count) for step in range(num_steps)
    ]
    return [ordered[len(ordered) // 2], *(ordered[rank] for rank in ranks)]


def _length_grouped(examples: Sequence[Example], *, batch_size: int, seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=draw).tolist()
    mega = batch_size * _MEGABATCH
    grouped = [
        examples[index]
        for start in range(0, len(order), mega)
        for index in sorted(order[start : start + mega], key=lambda i: -examples[i].num_tokens)
    ]
    whole = len(grouped) - len(grouped) % batch_size
    return [grouped[start : start + batch_size] for start in range(0, whole, batch_size)]


def plan_of(model: torch.nn.Module, config: Config, placement: str | None = None) -> ModulePlan:
    """Returns the modules and ranks of a placement; None: the config's."""
    return loracle.resolve_placement(
        placement or config.lora.placement,
        inventory=inventory_of(model),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
    )


def start_run(
    base: FrozenBase,
    *,
    config: Config,
    plan: ModulePlan,
    examples: Sequence[Example],
    name: str = "default",
) -> TrainState:
    """Returns the training state of a run with a new adapter on the base."""
    dropout, seed = config.lora.dropout, config.seed
    adapter = loracle.attach_adapter(
        base, name=name, plan=plan, dropout=dropout, seed=seed, model_source=config.model
    )
    return loracle.new_run(
        base, adapter=adapter, examples=examples, train=config.train, dropout=dropout, seed=seed
    )


def copy_initial(model: torch.nn.Module, *, seed: int) -> list[torch.nn.Parameter]:
    """Gives a PEFT model our loop's initial adapters; returns its trainable parameters."""
    trained = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, factor = name.removesuffix(".default.weight").rpartition(".")
        module = module.removeprefix("base_model.model.")
        with torch.no_grad():
            if factor == "lora_A":
                rank, features = parameter.shape
                parameter.copy_(initial_a(module, rank=rank, features=features, seed=seed))
            else:
                parameter.zero_()
        trained.append(parameter)
    return trained


def padded(rows: Sequence[dict[str, list[int]]], *, pad: int) -> dict[str, torch.Tensor]:
    """Returns ids, mask and labels of shape (batch, longest), padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    return {
        "input_ids": filled("input_ids", pad),
        "attention_mask": mask,
        "labels": filled("labels", -100),
    }


def labelled(example: Example) -> dict[str, list[int]]:
    """Returns ids and labels of an example in the form of Transformers and TRL."""
    ids = list(example.input_ids)
    return {"input_ids": ids, "labels": [-100] * example.num_prompt + ids[example.num_prompt :]}


def counts_of(batch: Batch) -> dict[str, int]:
    """Returns the numbers of real tokens, targets and padded positions of a batch."""
    return {
        "num_tokens": sum(example.num_tokens for example in batch),
        "num_targets": sum(example.num_targets for example in batch),
        "num_padded": len(batch) * max(example.num_tokens for example in batch),
    }


@dataclass(frozen=True)
class FixedOrder:
    """The batches of a block, instead of a run's own data order."""

    batches: Sequence[Batch]

    @property
    def steps_per_epoch(self) -> float:
        """Number of steps in the block."""
        return len(self.batches)

    def batch(self, step: int) -> Batch:
        """Returns the examples of a step; after the last, the first follows again."""
        return self.batches[step % len(self.batches)]


def load_frozen(work: Workload) -> FrozenBase:
    """Returns our frozen base for the block."""
    if work.geometry is not None:
        device, dtype = work.device, work.dtype
        return random_base(work.geometry, device=device, dtype=dtype, packing=work.packing)
    return loracle.load_base(work.folder, device=work.device, dtype=work.dtype)


def stock_model(work: Workload, *, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the same model, as Transformers loads it."""
    if work.geometry is not None:
        return random_model(work.geometry, device=work.device, dtype=dtype, packing=work.packing)
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(work.folder, dtype=dtype).to(work.device)


def shape_of(work: Workload) -> PreTrainedModel:
    """Returns the model without its weights."""
    meta = torch.device("meta")
    if work.geometry is not None:
        return random_model(work.geometry, device=meta, dtype=work.dtype)
    with meta, quiet_transformers():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work.folder))


def tokenizer_of(work: Workload) -> PreTrainedTokenizerBase:
    """Returns the model's tokenizer; for random weights, one that only pads."""
    if work.geometry is not None:
        return bare_tokenizer()
    return AutoTokenizer.from_pretrained(work.folder)


def random_work(
    geometry: str,
    *,
    num_steps: int,
    batch_size: int,
    device: str = "auto",
    dtype: str = "auto",
    length: int | None = None,
    packing: str | None = None,
) -> Workload:
    """Returns a warm-up and ``num_steps`` batches of random tokens for a random model.

    ``geometry`` is a key of ``GEOMETRIES``, ``length`` the tokens of every example (None:
    distributed as in Alpaca). With ``packing`` ``nf4`` activations are computed again, as usual.
    """
    config = config_of(
        f"train.max_steps={num_steps + 1}",
        f"train.batch_size={batch_size}",
        f"device={device}",
        f"dtype={dtype}",
        f"train.gradient_checkpointing={str(packing is not None).lower()}",
    )
    count = batch_size * (num_steps + 1)
    examples = random_examples(geometry, count=count, length=length)
    batches = (examples[start : start + batch_size] for start in range(0, count, batch_size))
    return _workload(config, batches, folder=Path(), geometry=geometry, packing=packing)
