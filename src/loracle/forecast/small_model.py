"""A small random model of an architecture: what its code does, asked before any weights are here.

Whether sequences of a row change each other, whether the head is one product, and how far positions
reach depend on an architecture's code and not on its widths. So the checks that a run makes of its
base are made of a miniature that keeps windows and positions, in a second or two on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loracle.config.run import Config
from loracle.errors import ModelError
from loracle.forecast.lengths import Lengths
from loracle.model.base import PROBES, FrozenBase
from loracle.model.faults import model_faults
from loracle.model.guard import checked, require_long_rows, stock_nll
from loracle.model.inventory import transformers_config
from loracle.model.layers.attention import PACKED
from loracle.model.limits import require_reach
from loracle.model.load import reason_not_loaded
from loracle.model.miniature import miniatures
from loracle.model.reach import require_reached
from loracle.placement import ModulePlan
from loracle.placement.llama_family import llama_family_inventory
from loracle.placement.plan import FULL
from loracle.screen import quiet_transformers


def require_usable(
    architecture: Mapping[str, Any], *, config: Config, lengths: Lengths, is_full: bool
) -> None:
    """Checks what of a run's base its configuration tells, in the words of a run.

    Raises:
        ModelError: If packed rows, the longest sequences or full fine-tuning cannot be had with it.
    """
    base = small_base(architecture, name=config.model)
    if base is None:
        return
    require_reach(
        base,
        tokens=config.data.max_tokens,
        what="the longest sequences",
        remedy="set data.max_tokens to at most {}",
    )
    require_long_rows(base, tokens=config.data.max_tokens)
    prompt, _ = lengths.example()
    if config.eval.generate_examples:
        require_reach(
            base,
            tokens=prompt + config.eval.max_new_tokens,
            what="the longest prompt and eval.max_new_tokens",
            remedy="lower data.max_tokens or eval.max_new_tokens, or set eval.generate_examples=0",
        )
    if is_full:
        require_reached(base, plan=ModulePlan(FULL, (), 0))


def has_plain_head(architecture: Mapping[str, Any]) -> bool:
    """Returns whether the logits are one product; taken to be where no small model can be made."""
    try:
        base = small_base(architecture, name="")
    except ModelError:
        return True
    return base is None or base.plain_head


def small_base(architecture: Mapping[str, Any], *, name: str) -> FrozenBase | None:
    """Returns a small base of this architecture, checked as a run checks its own.

    None where no small model can be made, or none is needed: Llama and its nearest kin are known.

    Raises:
        ModelError: If packed rows cannot be used with it, in the words of a run.
    """
    if llama_family_inventory(architecture) is not None:
        return None
    found = _small_base(json.dumps(architecture, sort_keys=True, default=str))
    if isinstance(found, ModelError):
        raise ModelError(str(found).replace(_NAME, name, 1))
    return found


_NAME = "<name>"


@lru_cache(maxsize=8)
def _small_base(architecture: str) -> FrozenBase | ModelError | None:
    try:
        base = random_base(json.loads(architecture))
        return None if base is None else checked(base)
    except ModelError as error:
        return error


def random_base(architecture: Mapping[str, Any]) -> FrozenBase | None:
    """Returns a base of random numbers; None if no small one can be made, or none runs by itself.

    Raises:
        ModelError: If Transformers cannot make the model for packed rows in its own size.
    """
    try:
        with model_faults("config.json"), quiet_transformers():
            config = transformers_config(architecture)
    except ModelError:
        return None
    for base in miniatures(config, tokens=None, keeps_lengths=True):
        _move_vectors(base)
        if _runs(base):
            return base
    what = f"{_NAME}: Transformers cannot load this model"
    with model_faults(what, reason=reason_not_loaded), quiet_transformers(), torch.device("meta"):
        AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    return None


def _move_vectors(base: FrozenBase) -> None:
    """Draws norms and biases, which would hide what they do as 1 and 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in base.model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))


def _runs(base: FrozenBase) -> bool:
    try:
        with model_faults("miniature"), quiet_transformers(), torch.inference_mode():
            return bool(torch.isfinite(stock_nll(base, PROBES[0])).all())
    except ModelError:
        return False
