"""A plan in PEFT's words: explicit names, so that PEFT has nothing left to guess."""

from __future__ import annotations

import re
from typing import Any

from loracle.placement.plan import ModulePlan, most_common_rank


def peft_config_of(plan: ModulePlan, *, dropout: float) -> dict[str, Any]:
    """Returns keyword arguments for ``peft.LoraConfig`` that adapt exactly the plan's modules.

    ``layers_to_transform`` and suffix patterns are not used: PEFT accepts entries that match
    nothing. Alpha is given per module wherever rank or alpha differ from the majority, because
    PEFT's ``rank_pattern`` alone would change the scaling alpha / r.

    Args:
        plan: The resolved placement.
        dropout: Probability that an element of an adapter's input is zeroed.
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
