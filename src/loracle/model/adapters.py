"""Adapters: created, named and saved by PEFT, initialised by module name, run by RoutedLinear."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loracle.errors import ModelError
from loracle.model.base import FrozenBase
from loracle.model.layers.lora import RoutedLinear, connect_router, install_routed_layers
from loracle.placement.plan import ModulePlan, most_common_rank
from loracle.screen import quiet_transformers
from loracle.seeds import numpy_stream

# Options of a tokenizer that say where it was found.
TOKENIZER_PLACES = ("name_or_path", "is_local", "local_files_only", "files_loaded")
# PEFT's prefix of a module's name, in its view of a model and in its files.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """One adapter on a base: its name, its plan, and its trainable tensors."""

    name: str
    plan: ModulePlan
    parameters: Mapping[str, nn.Parameter]
    """fp32 tensors by ``<module>.lora_A`` and ``<module>.lora_B``, in the plan's order."""


def attach_adapter(
    base: FrozenBase,
    *,
    name: str,
    plan: ModulePlan,
    dropout: float,
    seed: int,
    model_source: str,
    revision: str | None = None,
) -> Adapter:
    """Adds a new adapter to ``base``, initialised from random streams named after its modules.

    Args:
        base: The frozen model; it gets PEFT layers in place.
        name: Adapter name in PEFT; ``default`` saves without a subfolder.
        plan: The resolved placement.
        dropout: Recorded in the adapter's config; the masks themselves come from routes.
        seed: The run's seed.
        model_source: Recorded as the adapter's base model: what ``from_pretrained`` takes.
        revision: Recorded beside it: the commit of a model on the hub.

    Raises:
        ModelError: If PEFT does not adapt exactly the modules of the plan.
    """
    config = install_routed_layers(
        LoraConfig(
            base_model_name_or_path=model_source,
            revision=revision,
            **peft_config_of(plan, dropout=dropout),
        )
    )
    with quiet_transformers():
        if base.peft is None:
            base.model.name_or_path = model_source
            base.peft = get_peft_model(base.model, config, adapter_name=name)
        else:
            base.peft.add_adapter(name, config)
    connect_router(base.peft, router=base.router, prefix=PEFT_PREFIX)
    base.model.eval()
    adapter = Adapter(name=name, plan=plan, parameters=_tensors(base, name=name, plan=plan))
    _initialise(adapter, seed=seed)
    for parameter in adapter.parameters.values():
        parameter.requires_grad_(True)
    return adapter


def _tensors(base: FrozenBase, *, name: str, plan: ModulePlan) -> dict[str, nn.Parameter]:
    tensors: dict[str, nn.Parameter] = {}
    for planned in plan.modules:
        layer = base.model.get_submodule(planned.name)
        if not isinstance(layer, RoutedLinear) or name not in layer.lora_A:
            raise ModelError(
                f"{type(base.model).__name__}: PEFT put no adapter on {planned.name}, which the "
                f"placement '{plan.placement}' names; this architecture cannot take it"
            )
        tensors[f"{planned.name}.lora_A"] = layer.lora_A[name].weight
        tensors[f"{planned.name}.lora_B"] = layer.lora_B[name].weight
    return tensors


def _initialise(adapter: Adapter, *, seed: int) -> None:
    """Draws A as PEFT does, but from one stream per module; B starts at zero.

    PEFT draws all of A from one generator, so two placements with one seed would share the first
    module only. Rows are drawn in order, so a smaller rank starts as the top of a larger one.
    """
    for planned in adapter.plan.modules:
        a = adapter.parameters[f"{planned.name}.lora_A"]
        b = adapter.parameters[f"{planned.name}.lora_B"]
        with torch.no_grad():
            a.copy_(initial_a(planned.name, rank=a.shape[0], features=a.shape[1], seed=seed))
            b.zero_()


def initial_a(name: str, *, rank: int, features: int, seed: int) -> Float[Tensor, "rank features"]:
    """Returns lora_A of a module before training.

    Kaiming-uniform with a = sqrt(5), that is uniform within 1 / sqrt(features).
    Source: reset_lora_parameters, huggingface/peft@v0.21.2 src/peft/tuners/lora/layer.py.
    """
    bound = 1 / math.sqrt(features)
    drawn = numpy_stream(seed, "init", name).uniform(-bound, bound, size=(rank, features))
    return torch.from_numpy(drawn).float()


def load_adapter(
    base: FrozenBase, *, name: str, plan: ModulePlan, saved: Path, model_source: str
) -> Adapter:
    """Adds the adapter of ``saved``, an ``adapter_model.safetensors``, to ``base``.

    Raises:
        ModelError: If the file does not hold exactly the plan's tensors.
    """
    adapter = attach_adapter(
        base, name=name, plan=plan, dropout=0.0, seed=0, model_source=model_source
    )
    stored = load_file(saved)
    expected = {f"{PEFT_PREFIX}{key}.weight": value for key, value in adapter.parameters.items()}
    different = sorted(
        key
        for key in stored.keys() | expected.keys()
        if key not in stored or key not in expected or stored[key].shape != expected[key].shape
    )
    if different:
        raise ModelError(
            f"{saved.name}: {len(different)} tensors are not the plan's, first {different[0]}"
        )
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(stored[key])
    return adapter


def save_tokenizer(base: FrozenBase, *, folder: Path) -> None:
    """Writes the base's tokenizer beside an adapter, without the folder that it came from.

    PEFT enlarges a base whose embedding has fewer rows than the tokenizer beside an adapter has
    tokens, which changes every loss: such a tokenizer stays with its base.
    """
    if len(base.tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
        return
    with quiet_transformers():
        base.tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in TOKENIZER_PLACES}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_adapter(base: FrozenBase, *, name: str, folder: Path) -> Path:
    """Writes the adapter in PEFT's format to ``folder`` and returns it.

    ``target_modules`` is a set in PEFT and its order in the file would vary between processes, so
    it is sorted. The generic model card that PEFT adds is removed.
    """
    assert base.peft is not None
    card = folder / "README.md"
    # PEFT would read a card that an earlier life of the run wrote, and write into it.
    card.unlink(missing_ok=True)
    with quiet_transformers():
        base.peft.save_pretrained(
            str(folder),
            selected_adapters=[name],
            save_embedding_layers=False,
            safe_serialization=True,
        )
    card.unlink(missing_ok=True)
    written = folder if name == "default" else folder / name
    config_path = written / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    ordered = {k: sorted(v) if k == "target_modules" else v for k, v in sorted(config.items())}
    config_path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    return written


def peft_config_of(plan: ModulePlan, *, dropout: float) -> dict[str, Any]:
    """Returns keyword arguments for ``peft.LoraConfig`` that adapt exactly the plan's modules.

    ``layers_to_transform`` and suffix patterns are not used: PEFT accepts entries that match
    nothing. Alpha is given per module wherever rank or alpha differ from the majority, because
    PEFT's ``rank_pattern`` alone would change the scaling alpha / r.
    """
    rank, alpha = most_common_rank(plan)
    return {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": any(module.fan_in_fan_out for module in plan.modules),
        "target_modules": [module.name for module in plan.modules],
        "rank_pattern": {_exactly(m.name): m.rank for m in plan.modules if m.rank != rank},
        "alpha_pattern": {_exactly(m.name): m.alpha for m in plan.modules if m.alpha != alpha},
    }


def _exactly(name: str) -> str:
    # PEFT matches rf"(.*\.)?({key})$", so that a bare name also matches as a suffix.
    return f"^{re.escape(name)}"
