"""Seconds per optimizer step: our loop and a plain PEFT loop, side by side on one machine.

    make bench

Same model, data, batches, placement, optimizer and dtype; dropout 0 and the same initial adapters,
so the losses must agree, and are printed together. The two take turns step by step, so that
whatever else the machine does hits both. Writes ``results/benchmarks/step_time-<date>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import loracle
from loracle.config import Config
from loracle.data import Example, PreparedData
from loracle.device import dtype_name, keep_large_blocks, synchronize
from loracle.environment import capture_environment
from loracle.model.base import FrozenBase
from loracle.placement import ModulePlan, peft_config_of
from loracle.quiet import quiet_transformers
from loracle.schedule import DataOrder, learning_rate

SKIPPED = 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=10, help="steps of each, after the warm-up")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = arguments.parse_args()
    config = loracle.load_config(
        "base_config", overrides=["lora.dropout=0.0", "train.warmup_frac=0.0", *given.set]
    )
    keep_large_blocks()
    device = loracle.choose_device(config.device)
    dtype = loracle.choose_dtype(config.dtype, device=device)
    model = loracle.resolve_model(config.model, progress=print)
    base = loracle.load_base(model.path, device=device, dtype=dtype)
    source = loracle.resolve_data(config.data.source, progress=print)
    data = loracle.prepare_data(source, config=config.data, tokenizer=base.tokenizer)
    plan = loracle.resolve_placement(
        config.lora.placement,
        inventory=loracle.inventory_of(base.model),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
    )
    ours, initial = our_steps(base, config=config, data=data, plan=plan)
    plain = plain_steps(base, model.path, config=config, data=data, plan=plan, initial=initial)
    rows = []
    for step in range(given.steps + SKIPPED):
        (our_loss, our_s), (plain_loss, plain_s) = next(ours), next(plain)
        print(f"step {step + 1}: ours {our_loss:.4f} in {our_s:.2f} s, "
              f"plain PEFT {plain_loss:.4f} in {plain_s:.2f} s")  # fmt: skip
        rows.append({"ours": [our_loss, our_s], "plain": [plain_loss, plain_s]})
    clocked = rows[SKIPPED:]
    medians = {name: statistics.median(row[name][1] for row in clocked) for name in rows[0]}
    report = {
        "what": "seconds per optimizer step, median; loss in nats per token and seconds per step",
        "device": str(device),
        "dtype": dtype_name(dtype),
        "median_s": medians,
        "ratio": medians["plain"] / medians["ours"],
        "num_steps": len(clocked),
        "largest_loss_difference": max(abs(row["ours"][0] - row["plain"][0]) for row in rows),
        "rows": rows,
        "environment": capture_environment(device=str(device), dtype=dtype_name(dtype)),
    }
    path = Path("results/benchmarks") / f"step_time-{datetime.now(UTC):%Y%m%d}-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"ours {medians['ours']:.2f} s, plain PEFT loop {medians['plain']:.2f} s: "
          f"{report['ratio']:.2f} times as fast; written to {path}")  # fmt: skip


def our_steps(
    base: FrozenBase, *, config: Config, data: PreparedData, plan: ModulePlan
) -> tuple[Iterator[tuple[float, float]], dict[str, torch.Tensor]]:
    """Returns the steps of our loop as (loss, seconds), and the initial adapter."""
    adapter = loracle.attach_adapter(
        base, name="default", plan=plan, dropout=0.0, seed=config.seed, model_source=config.model
    )
    initial = {name: tensor.detach().clone() for name, tensor in adapter.parameters.items()}
    run = loracle.new_run(
        base,
        adapter=adapter,
        examples=data.train,
        train=config.train,
        dropout=0.0,
        seed=config.seed,
    )
    budget = config.train.micro_batch_tokens
    steps = loracle.train_bundle(base, [run], micro_batch_tokens=budget)
    return ((row.loss_nats_per_token, row.step_time_s) for (row,) in steps if row), initial


def plain_steps(
    base: FrozenBase,
    folder: Path,
    *,
    config: Config,
    data: PreparedData,
    plan: ModulePlan,
    initial: dict[str, torch.Tensor],
) -> Iterator[tuple[float, float]]:
    """Yields (loss, seconds) of a loop as a PEFT user writes it: padded rows, all logits."""
    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype).to(base.device)
        model = get_peft_model(stock, LoraConfig(**peft_config_of(plan, dropout=0.0)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data.copy_(initial[key])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=config.train.weight_decay, fused=True)
    order = DataOrder(data.train, batch_size=config.train.batch_size, seed=config.seed)
    for step in range(config.train.max_steps):
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(step, train=config.train)
        ids, mask, labels = padded(order.batch(step), pad=base.tokenizer.eos_token_id)
        logits = model(input_ids=ids.to(base.device), attention_mask=mask.to(base.device)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(base.device)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        synchronize(base.device)
        yield value, time.perf_counter() - began


def padded(batch: list[Example], *, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ids, attention mask and labels of shape (batch, longest), padded on the right."""
    width = max(example.num_tokens for example in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, example in enumerate(batch):
        tokens = torch.as_tensor(example.input_ids)
        ids[index, : len(tokens)] = tokens
        mask[index, : len(tokens)] = 1
        labels[index, example.num_prompt : len(tokens)] = tokens[example.num_prompt :]
    return ids, mask, labels


if __name__ == "__main__":
    main()
