"""Full fine-tuning: all weights of the model in place of an adapter's.

The weights stay in fp32, as AdamW needs them, and are used in the base's dtype by autocast. They
are saved as Transformers saves a model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.placement import ModulePlan
from loracle.screen import quiet_transformers

WEIGHTS = "model.safetensors"
# One file, so that its digest is the model's.
_SHARD_SIZE = "1TB"


def whole_model(base: FrozenBase, *, name: str, plan: ModulePlan) -> Adapter:
    """Returns all weights of a trainable base as the adapter of a run, tied ones once."""
    assert base.trains, "the base is frozen"
    return Adapter(name=name, plan=plan, parameters=dict(base.model.named_parameters()))


def save_whole(base: FrozenBase, *, folder: Path) -> Path:
    """Writes the model and its tokenizer to ``folder`` as Transformers does, and returns it."""
    with quiet_transformers():
        base.model.save_pretrained(str(folder), max_shard_size=_SHARD_SIZE)
        base.tokenizer.save_pretrained(str(folder))
    return folder


def moved_weights(trained: Adapter, *, model_folder: Path) -> int:
    """Returns how many trained tensors are finite and differ from those of the initial model."""
    before = stored_weights(model_folder)
    return sum(
        bool(torch.isfinite(value).all())
        and not torch.equal(value.detach().cpu(), before[name].to(value.dtype))
        for name, value in trained.parameters.items()
    )


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of all files in a model's folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
