"""LoRAcle: where should LoRA adapters go? A laboratory that answers with evidence.

The public API is what ``__all__`` names. It is imported on first use, so that the command and
``import loracle`` start without loading PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# PEFT imports bitsandbytes where it finds it, which then lists the kernels that it did not find.
getLogger("bitsandbytes").setLevel(ERROR)

if TYPE_CHECKING:
    from loracle.baseline import run_baseline
    from loracle.config import Config
    from loracle.configfile import load_config
    from loracle.data import prepare_data
    from loracle.device import choose_device, choose_dtype
    from loracle.evaluate import answer_prompts, likelihood, score_answers, score_examples
    from loracle.model.adapters import attach_adapter, load_adapter, save_adapter
    from loracle.model.inventory import inventory_of
    from loracle.model.load import load_base
    from loracle.placement import resolve_placement
    from loracle.runner import RunSpec, run_many
    from loracle.sample import sample_run
    from loracle.sources import resolve_data, resolve_model
    from loracle.train import train_bundle
    from loracle.training_run import new_run

_HOMES = {
    "Config": "loracle.config",
    "RunSpec": "loracle.runner",
    "answer_prompts": "loracle.evaluate",
    "attach_adapter": "loracle.model.adapters",
    "choose_device": "loracle.device",
    "choose_dtype": "loracle.device",
    "inventory_of": "loracle.model.inventory",
    "likelihood": "loracle.evaluate",
    "load_adapter": "loracle.model.adapters",
    "load_base": "loracle.model.load",
    "load_config": "loracle.configfile",
    "new_run": "loracle.training_run",
    "prepare_data": "loracle.data",
    "resolve_data": "loracle.sources",
    "resolve_model": "loracle.sources",
    "resolve_placement": "loracle.placement",
    "run_baseline": "loracle.baseline",
    "run_many": "loracle.runner",
    "sample_run": "loracle.sample",
    "save_adapter": "loracle.model.adapters",
    "score_answers": "loracle.evaluate",
    "score_examples": "loracle.evaluate",
    "train_bundle": "loracle.train",
}

__all__ = [
    "Config",
    "RunSpec",
    "answer_prompts",
    "attach_adapter",
    "choose_device",
    "choose_dtype",
    "inventory_of",
    "likelihood",
    "load_adapter",
    "load_base",
    "load_config",
    "new_run",
    "prepare_data",
    "resolve_data",
    "resolve_model",
    "resolve_placement",
    "run_baseline",
    "run_many",
    "sample_run",
    "save_adapter",
    "score_answers",
    "score_examples",
    "train_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loracle' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
