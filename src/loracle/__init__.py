"""LoRAcle: where should LoRA adapters go? A laboratory that answers with evidence.

The public API is listed in ``__all__``. It is imported on first use, so that the command and
``import loracle`` start without loading PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any

from loracle.version import __version__

# PEFT imports bitsandbytes if it is installed, which then logs the kernels it did not find.
getLogger("bitsandbytes").setLevel(ERROR)

if TYPE_CHECKING:
    from loracle.config.files import load_config
    from loracle.config.run import Config
    from loracle.data import prepare_data
    from loracle.engine.answers import answer_prompts, score_answers
    from loracle.engine.device import choose_device, choose_dtype
    from loracle.engine.evaluate import likelihood, score_examples
    from loracle.engine.train import train_bundle
    from loracle.engine.train_state import new_run
    from loracle.model.adapters import attach_adapter, load_adapter, save_adapter
    from loracle.model.inventory import inventory_of
    from loracle.model.load import load_base
    from loracle.placement import resolve_placement
    from loracle.runner.run_many import run_baseline, run_many
    from loracle.runner.run_spec import RunSpec
    from loracle.runner.sample import sample_run
    from loracle.sources import resolve_data, resolve_model

_HOMES = {
    "Config": "loracle.config.run",
    "RunSpec": "loracle.runner.run_spec",
    "answer_prompts": "loracle.engine.answers",
    "attach_adapter": "loracle.model.adapters",
    "choose_device": "loracle.engine.device",
    "choose_dtype": "loracle.engine.device",
    "inventory_of": "loracle.model.inventory",
    "likelihood": "loracle.engine.evaluate",
    "load_adapter": "loracle.model.adapters",
    "load_base": "loracle.model.load",
    "load_config": "loracle.config.files",
    "new_run": "loracle.engine.train_state",
    "prepare_data": "loracle.data",
    "resolve_data": "loracle.sources",
    "resolve_model": "loracle.sources",
    "resolve_placement": "loracle.placement",
    "run_baseline": "loracle.runner.run_many",
    "run_many": "loracle.runner.run_many",
    "sample_run": "loracle.runner.sample",
    "save_adapter": "loracle.model.adapters",
    "score_answers": "loracle.engine.answers",
    "score_examples": "loracle.engine.evaluate",
    "train_bundle": "loracle.engine.train",
}

__all__ = [
    "Config",
    "RunSpec",
    "__version__",
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
