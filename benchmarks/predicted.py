"""A training step as ``loracle plan`` predicts it, without weights, for three benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loracle.config.run import Config
from loracle.forecast.devices import Device
from loracle.forecast.meta_base import model_without_weights
from loracle.forecast.predict import GRANULE
from loracle.forecast.trace import Trace, synthetic_examples, trace_step
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import ModulePlan, resolve_placement


def plan_from(architecture: Mapping[str, Any], config: Config) -> ModulePlan:
    """Returns the modules and ranks of the config's placement, without building the model."""
    inventory = inventory_from_architecture(architecture)
    lora = config.lora
    return resolve_placement(lora.placement, inventory=inventory, rank=lora.rank, alpha=lora.alpha)


def predicted_step(
    architecture: Mapping[str, Any],
    *,
    config: Config,
    device: Device,
    dtype: torch.dtype,
    lengths: Sequence[tuple[int, int]],
) -> Trace:
    """Returns the trace of a step; ``lengths`` are prompt and response tokens per example."""
    plan = plan_from(architecture, config)
    with model_without_weights(
        architecture,
        plan=plan,
        device=device,
        dtype=dtype,
        dropout=config.lora.dropout,
        quantization=config.quantization,
    ) as (base, adapter):
        return trace_step(
            base,
            adapter=adapter,
            config=config,
            examples=synthetic_examples(lengths),
            granule=GRANULE if device.is_gpu else 1,
        )
