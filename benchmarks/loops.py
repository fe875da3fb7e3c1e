"""The compared loops: ours, TRL's, the plain Trainer's, and a hand-written one.

Every loop is a function from a block of work to one row per optimizer step. All start from the same
adapters, use the same batches, learning rates and clipping norm, and are timed from the end of one
optimizer step to the end of the next.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import loracle
from figures import Row
from loracle.engine.device import keep_large_blocks, synchronize
from loracle.engine.schedule import learning_rate
from loracle.model.adapters import peft_config_of
from loracle.screen import quiet_transformers
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
    start_run,
    stock_model,
    tokenizer_of,
)

Rows = list[Row]
Loop = Callable[[Workload], Rows]


def our_loop(work: Workload) -> Rows:
    """Trains with ``train_bundle``, as ``loracle baseline`` does."""
    config = work.config
    keep_large_blocks()
    base = load_frozen(work)
    plan = plan_of(base.model, config)
    run = start_run(base, config=config, plan=plan, examples=work.batches[0])
    run = replace(run, order=FixedOrder(work.batches))
    steps = loracle.train_bundle(
        base,
        [run],
        micro_batch_tokens=config.train.micro_batch_tokens,
        checkpointing=config.train.gradient_checkpointing,
    )
    return [
        _row(work, index, loss=record.loss_nats_per_token, seconds=record.step_time_s)
        for index, (record,) in zip(range(len(work.batches)), steps, strict=False)
        if record is not None
    ]


def peft_loop(work: Workload) -> Rows:
    """Trains as a PEFT user would write it: padded rows, all logits, base in its dtype."""
    config = work.config
    model = _peft_model(work, dtype=work.dtype).train()
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = copy_initial(model, seed=config.seed)
    optimizer = torch.optim.AdamW(trained, weight_decay=config.train.weight_decay, fused=True)
    pad = tokenizer_of(work).eos_token_id
    rows, ended_at = [], time.perf_counter()
    for index, batch in enumerate(work.batches):
        optimizer.param_groups[0]["lr"] = learning_rate(index, train=config.train)
        inputs = padded([labelled(example) for example in batch], pad=pad)
        inputs = {key: value.to(work.device) for key, value in inputs.items()}
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
        started_at, ended_at = ended_at, time.perf_counter()
        rows.append(_row(work, index, loss=value, seconds=ended_at - started_at))
    return rows


def trainer_loop(work: Workload) -> Rows:
    """Trains with Transformers' Trainer around a PEFT model."""
    model = _peft_model(work, dtype=torch.float32)
    tokenizer = tokenizer_of(work)
    settings = _trainer_settings(work) | {"bf16": work.dtype == torch.bfloat16}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=folder, **settings),
            train_dataset=dataset_of(work.batches),
            data_collator=partial(padded, pad=tokenizer.eos_token_id),
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
    """Yields TRL's SFTTrainer on the block's data, with ``changes`` to its ``SFTConfig``."""
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
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


def _trainer_settings(work: Workload) -> dict[str, Any]:
    """Returns the settings for our work in Trainer and TRL, none of which makes them slower."""
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


class _Clock(TrainerCallback):
    """Ends training after the block, and records the time of each optimizer step's end."""

    def __init__(self, device: torch.device, num_steps: int) -> None:
        self.device, self.num_steps, self.times = device, num_steps, [time.perf_counter()]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        control.should_training_stop = state.global_step >= self.num_steps


def clocked(trainer: Trainer, work: Workload) -> Rows:
    """Trains through the block; losses are the trainer's own, unrounded."""
    copy_initial(trainer.model, seed=work.config.seed)
    clock = _Clock(work.device, len(work.batches))
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    losses: list[torch.Tensor] = []
    own_step = trainer.training_step

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        losses.append(own_step(*args, **kwargs).detach())
        return losses[-1]

    trainer.training_step = step
    with quiet_transformers():
        trainer.train()
    return [
        _row(work, index, loss=loss.item(), seconds=clock.times[index + 1] - clock.times[index])
        for index, loss in enumerate(losses)
    ]


def _row(work: Workload, index: int, *, loss: float, seconds: float) -> Row:
    return {
        "step": index,
        "warm_up": index == 0,
        "loss_nats_per_token": loss,
        "step_time_s": seconds,
        **counts_of(work.batches[index]),
    }
