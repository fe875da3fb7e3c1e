"""The loops that are compared: ours, TRL's, the plain Trainer's, and one written by hand.

Every loop is a function from a block of work to one row per optimizer step. All start from the same
adapters, take the same batches with the same learning rates, clip at the same norm, and are clocked
from the end of one optimizer step to the end of the next.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import loracle
from loracle.engine.device import keep_large_blocks, synchronize
from loracle.engine.schedule import learning_rate
from loracle.model.adapters import peft_config_of
from loracle.quiet import quiet_transformers
from workload import (
    Batch,
    FixedOrder,
    Workload,
    copy_initial,
    counts_of,
    labelled,
    load_frozen,
    padded,
    plan_of,
    shape_of,
    stock_model,
    tokenizer_of,
)

Rows = list[dict[str, Any]]
Loop = Callable[[Workload], Rows]


def our_loop(work: Workload) -> Rows:
    """Takes the steps with ``train_bundle``, as ``loracle baseline`` does."""
    config = work.config
    keep_large_blocks()
    base = load_frozen(work)
    adapter = loracle.attach_adapter(
        base,
        name="default",
        plan=plan_of(base.model, config),
        dropout=config.lora.dropout,
        seed=config.seed,
        model_source=config.model,
    )
    run = loracle.new_run(
        base,
        adapter=adapter,
        examples=work.batches[0],
        train=config.train,
        dropout=config.lora.dropout,
        seed=config.seed,
    )
    run = replace(run, order=FixedOrder(work.batches))
    steps = loracle.train_bundle(base, [run], micro_batch_tokens=config.train.micro_batch_tokens)
    return [
        _row(work, index, loss=record.loss_nats_per_token, seconds=record.step_time_s)
        for index, (record,) in zip(range(len(work.batches)), steps, strict=False)
        if record is not None
    ]


def peft_loop(work: Workload) -> Rows:
    """Takes the steps as a PEFT user writes them: padded rows, all logits, base in its dtype."""
    config = work.config
    model = _peft_model(work, dtype=work.dtype).train()
    trained = copy_initial(model, seed=config.seed)
    optimizer = torch.optim.AdamW(trained, weight_decay=config.train.weight_decay, fused=True)
    pad = tokenizer_of(work).eos_token_id
    rows, ended = [], time.perf_counter()
    for index, batch in enumerate(work.batches):
        optimizer.param_groups[0]["lr"] = learning_rate(index, train=config.train)
        inputs = {key: value.to(work.device) for key, value in padded(batch, pad=pad).items()}
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        synchronize(work.device)
        began, ended = ended, time.perf_counter()
        rows.append(_row(work, index, loss=value, seconds=ended - began))
    return rows


def trainer_loop(work: Workload) -> Rows:
    """Takes the steps with Transformers' Trainer around a PEFT model."""
    model = _peft_model(work, dtype=torch.float32)
    tokenizer = tokenizer_of(work)
    settings = _trainer_settings(work) | {"bf16": work.dtype == torch.bfloat16}

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return _padded_rows(rows, pad=tokenizer.eos_token_id)

    with _scratch() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=folder, **settings),
            train_dataset=dataset_of(work.batches),
            data_collator=collate,
            processing_class=tokenizer,
        )
        return clocked(trainer, work)


def trl_loop(**changes: Any) -> Loop:
    """Returns the loop of TRL's SFTTrainer as shipped, with ``changes`` to its ``SFTConfig``."""

    def loop(work: Workload) -> Rows:
        with trl_trainer(work, **changes) as trainer:
            return clocked(trainer, work)

    return loop


@contextmanager
def trl_trainer(work: Workload, **changes: Any) -> Iterator[Trainer]:
    """Lends TRL's SFTTrainer with the block's data, with ``changes`` to its ``SFTConfig``."""
    from trl import SFTConfig, SFTTrainer

    with _scratch() as folder:
        chosen = _trl_settings(work, changes)
        model: Any = str(work.folder)
        if work.geometry is not None:
            named = chosen.pop("model_init_kwargs", {}).get("dtype", "float32")
            model = stock_model(work, dtype=getattr(torch, named))
        with quiet_transformers():
            yield SFTTrainer(
                model=model,
                args=SFTConfig(output_dir=folder, **chosen),
                train_dataset=dataset_of(work.batches),
                processing_class=tokenizer_of(work),
                peft_config=_peft_config(work),
            )


def _trl_settings(work: Workload, changes: dict[str, Any]) -> dict[str, Any]:
    settings = _trainer_settings(work) | {"max_length": work.config.data.max_tokens} | changes
    if work.dtype != torch.bfloat16:  # a device, or a check, without bf16
        settings["bf16"] = False
        settings.pop("model_init_kwargs", None)
    return settings


def _peft_model(work: Workload, *, dtype: torch.dtype) -> torch.nn.Module:
    with quiet_transformers():
        return get_peft_model(stock_model(work, dtype=dtype), _peft_config(work))


def _peft_config(work: Workload) -> LoraConfig:
    plan = plan_of(shape_of(work), work.config)
    return LoraConfig(**peft_config_of(plan, dropout=work.config.lora.dropout))


def dataset_of(batches: Iterable[Batch]) -> Dataset:
    """Returns the batches' examples one after another, tokenised and labelled."""
    return Dataset.from_list([labelled(example) for batch in batches for example in batch])


def _padded_rows(rows: list[dict[str, list[int]]], *, pad: int) -> dict[str, torch.Tensor]:
    """Returns tokenised rows as a padded batch, as the usual collators do."""
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


def _trainer_settings(work: Workload) -> dict[str, Any]:
    """Returns what makes Trainer and TRL do our work, and nothing that makes them slower."""
    train = work.config.train
    return {
        "use_cpu": work.device.type == "cpu",
        "per_device_train_batch_size": train.batch_size,
        "max_steps": train.max_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": math.ceil(train.warmup_frac * train.max_steps),
        "weight_decay": train.weight_decay,
        "adam_beta1": train.beta1,
        "adam_beta2": train.beta2,
        "adam_epsilon": train.epsilon,
        "max_grad_norm": train.max_grad_norm or 0.0,
        "train_sampling_strategy": "sequential",
        "seed": work.config.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@contextmanager
def _scratch() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield folder


class _Clock(TrainerCallback):
    """Ends training after the block, and notes when each optimizer step ended."""

    def __init__(self, device: torch.device, num_steps: int) -> None:
        self.device, self.num_steps, self.times = device, num_steps, [time.perf_counter()]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        control.should_training_stop = state.global_step >= self.num_steps


def clocked(trainer: Trainer, work: Workload) -> Rows:
    """Trains through the block; the loss is what the trainer's own step returns, unrounded."""
    copy_initial(trainer.model, seed=work.config.seed)
    clock = _Clock(work.device, len(work.batches))
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    losses: list[torch.Tensor] = []
    own_step = trainer.training_step

    def step(*given: Any, **named: Any) -> torch.Tensor:
        losses.append(own_step(*given, **named).detach())
        return losses[-1]

    trainer.training_step = step
    with quiet_transformers():
        trainer.train()
    return [
        _row(work, index, loss=loss.item(), seconds=clock.times[index + 1] - clock.times[index])
        for index, loss in enumerate(losses)
    ]


def _row(work: Workload, index: int, *, loss: float, seconds: float) -> dict[str, Any]:
    return {
        "step": index,
        "warm_up": index == 0,
        "loss_nats_per_token": loss,
        "step_time_s": seconds,
        **counts_of(work.batches[index]),
    }
