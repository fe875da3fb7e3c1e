"""Checks of a finished run: what trained, what stayed frozen, and whether it reloads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loracle.data import Example
from loracle.engine.evaluate import ExampleScore
from loracle.errors import AuditError
from loracle.model.adapters import PEFT_PREFIX, Adapter
from loracle.model.base import FrozenBase
from loracle.model.layers.attention import without_cudnn_attention
from loracle.model.load import straight_to
from loracle.model.stock import stock_over
from loracle.model.whole import moved_weights, stored_weights
from loracle.records.names import ADAPTER_WEIGHTS
from loracle.records.result import Audit
from loracle.screen import quiet_transformers

# Losses of two orders of summation differ by this standard deviation, in nats, times the root of an
# example's target tokens. measured in bf16: 0.037 to 0.068 (SmolLM2-135M, 32 and 40 examples,
# 2026-11-30, benchmarks/rounding.py, results/benchmarks/rounding-*). assumed: up to 0.12 where
# partial sums are rounded too, an eighth of it in fp16, and in fp32 what was allowed before.
_ROUNDING_NATS = {torch.float32: 2e-4, torch.bfloat16: 0.12, torch.float16: 0.015}
_DEVIATIONS = 5.0
"""Allowed of a total, and of a single example; a normal error passes 3.9 once in 10,000 runs."""


def audit_run(
    base: FrozenBase,
    *,
    trained: Adapter,
    saved: Path,
    model_folder: Path,
    digest_before: str,
    digest_after: str,
    examples: Sequence[Example],
    scores: Sequence[ExampleScore],
    progress: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Returns the audit of a finished run, of an adapter or of full fine-tuning.

    After full fine-tuning ``base`` cannot be used any more.

    Args:
        base: The base it trained on.
        trained: Its adapter in memory, or all weights.
        saved: Folder of the saved adapter or model.
        model_folder: Folder of the weights that training began with.
        digest_before: ``base.weights_digest()`` from before training.
        digest_after: The same from after the last step that any run on the base took.
        examples: Validation examples to score again.
        scores: The run's final scores of these examples.
        progress: Called after each example.
    """
    plan = trained.plan
    tokens = sum(score.num_targets for score in scores)
    recorded = math.fsum(score.nll_sum_nats for score in scores) / tokens
    if plan.is_full:
        updated = moved_weights(trained, model_folder=model_folder)
    else:
        lora_b = [trained.parameters[f"{module.name}.lora_B"] for module in plan.modules]
        updated = sum(bool(torch.isfinite(b).all() and b.any()) for b in lora_b)
    trainable, exact = count_trainable(base, adapter=trained.name), _saved_exactly(trained, saved)
    if plan.is_full:
        # Not two models at a time: the trained one is on the disk, and nothing else uses it.
        base.release()
    reloaded = stock_nll_sums(
        None if plan.is_full else saved,
        model_folder=saved if plan.is_full else model_folder,
        examples=examples,
        like=base,
        progress=progress,
    )
    return Audit(
        updated_modules=updated,
        planned_modules=len(trained.parameters if plan.is_full else plan.modules),
        frozen_weights_unchanged=None if plan.is_full else digest_after == digest_before,
        trainable_params=trainable,
        planned_params=plan.trainable_params,
        saved_tensors_exact=exact,
        reloaded_loss_nats_per_token=math.fsum(reloaded) / tokens,
        recorded_loss_nats_per_token=recorded,
        reloaded_examples=len(reloaded),
        relative_tolerance=tolerated(base.dtype, loss=recorded, num_tokens=tokens),
        example_spread_nats=spread_of(reloaded, scores),
        tolerated_spread_nats=tolerated_spread(base.dtype, num_examples=len(scores)),
    )


def tolerated(dtype: torch.dtype, *, loss: float, num_tokens: int) -> float:
    """Returns the relative difference to ``loss``, in nats per token, that rounding explains."""
    return _DEVIATIONS * _ROUNDING_NATS[dtype] / math.sqrt(num_tokens) / max(loss, 1e-12)


def tolerated_spread(dtype: torch.dtype, *, num_examples: int) -> float:
    """Returns the spread of the examples' differences, in nats, that rounding explains.

    A fault moves some examples up and some down, so that the total may hide it; the root mean
    square does not. Of one example it may be as far out as a total, of many it is known better.
    """
    return _ROUNDING_NATS[dtype] * (1 + (_DEVIATIONS - 1) / math.sqrt(num_examples))


def spread_of(reloaded: Sequence[float], scores: Sequence[ExampleScore]) -> float:
    """Returns the root mean square of the examples' differences over the root of their tokens."""
    squares = (
        (nll - score.nll_sum_nats) ** 2 / score.num_targets
        for nll, score in zip(reloaded, scores, strict=True)
    )
    return math.sqrt(math.fsum(squares) / len(scores))


def require_sound(audit: Audit) -> None:
    """Raises AuditError if any claim does not hold."""
    if audit.faults:
        raise AuditError("audit: " + "; ".join(audit.faults))


def count_trainable(base: FrozenBase, *, adapter: str) -> int:
    """Returns how many parameters train in a run, wrongly unfrozen ones included."""
    return sum(
        parameter.numel()
        for name, parameter in base.model.named_parameters()
        if parameter.requires_grad and (".lora_" not in name or f".{adapter}." in name)
    )


def _saved_exactly(trained: Adapter, saved: Path) -> bool:
    if trained.plan.is_full:
        stored, expected = stored_weights(saved), trained.parameters
    else:
        stored = load_file(saved / ADAPTER_WEIGHTS)
        expected = {f"{PEFT_PREFIX}{key}.weight": x for key, x in trained.parameters.items()}
        if stored.keys() != expected.keys():
            return False
    return all(
        name in stored and torch.equal(stored[name], value.detach().cpu())
        for name, value in expected.items()
    )


def stock_nll_sums(
    saved: Path | None,
    *,
    model_folder: Path,
    examples: Sequence[Example],
    like: FrozenBase,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Returns each example's NLL in nats through unmodified Transformers and PEFT.

    Modules built anew from the folder's configuration, stock attention, the adapter from its file,
    PEFT's own forward, one example at a time; token ids are ours, and the tensors of ``like``,
    because two bases need not fit on the device: their digest shows that they are as they were
    loaded. Without ``saved``, the adapter's folder, the whole model was trained and is read from
    its own; ``like`` then gives dtype and device only.
    """
    with quiet_transformers():
        if saved is None:
            model = _whole_model(model_folder, like=like)
        else:
            stock = stock_over(like, folder=model_folder)
            model = PeftModel.from_pretrained(stock, str(saved))
    model.eval()
    for module in model.modules():
        # In evaluation bitsandbytes rounds the block scales to bf16 on a CPU, for speed.
        if type(module).__name__ == "Linear4bit" and isinstance(module, nn.Linear):
            module.train()
    sums = []
    for example in examples:
        ids = torch.as_tensor(example.input_ids, dtype=torch.int64, device=like.device)[None]
        with torch.inference_mode(), like.precision(), without_cudnn_attention():
            logits = model(input_ids=ids).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        sums.append(nll[max(example.num_prompt, 1) - 1 :].double().sum().item())
        progress(1)
    return sums


def _whole_model(folder: Path, *, like: FrozenBase) -> PreTrainedModel:
    """Returns the model that full fine-tuning saved, as Transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        **straight_to(like.device),
    )
    return model
