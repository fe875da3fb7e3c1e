"""The contenders by name, and the settings of TRL that are tried or left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import disable_progress_bars

from loops import Loop, Rows, our_loop, peft_loop, trainer_loop, trl_loop
from loracle.engine.device import keep_large_blocks
from workload import Workload


@dataclass(frozen=True)
class Contender:
    """One way to do the same work."""

    label: str
    """Its name and settings in the table."""
    loop: Loop
    changes: Mapping[str, Any] = field(default_factory=dict)
    """For TRL only: differences from its ``SFTConfig`` as shipped."""
    grouped: bool = False
    """Whether batches are length-grouped, so that only seconds per real token are comparable."""
    system: bool = False
    """Whether glibc keeps large blocks and oneDNN computes fp32 products."""


def _trl(label: str, *, grouped: bool = False, **changes: Any) -> Contender:
    return Contender(label, trl_loop(**changes), changes=changes, grouped=grouped)


_NO_CHECKPOINTS = {"gradient_checkpointing": False}
_HALF = _NO_CHECKPOINTS | {"model_init_kwargs": {"dtype": "bfloat16"}}

CONTENDERS: dict[str, Contender] = {
    "loracle": Contender("LoRAcle", our_loop),
    "trl-bf16": _trl("TRL bf16, checkpointing off", **_NO_CHECKPOINTS),
    "trl-shipped": _trl("TRL as shipped (bf16, checkpointing on)"),
    "trl-fp32": _trl("TRL `bf16=False`, checkpointing off", bf16=False, **_NO_CHECKPOINTS),
    "trainer": Contender("Trainer + PEFT, bf16", trainer_loop),
    "peft-loop": Contender("hand-written PEFT loop, bf16", peft_loop),
}
"""The contenders besides the tuned TRL, whose settings are found by trying them."""

TUNED: dict[str, Contender] = {
    "grouped": _trl(
        "group_by_length, base in fp32 under autocast", grouped=True, **_NO_CHECKPOINTS
    ),
    "grouped-half": _trl("group_by_length, base loaded in bf16, autocast", grouped=True, **_HALF),
    "grouped-half-plain": _trl(
        "group_by_length, base loaded in bf16, no autocast (bf16=False)",
        grouped=True,
        bf16=False,
        **_HALF,
    ),
    "padding-free-half": _trl(
        "padding_free, base loaded in bf16, autocast", padding_free=True, max_length=None, **_HALF
    ),
}
"""Combinations of the settings that TRL's documentation advises for speed."""

NOT_TRIED = {
    "packing=True": "puts other examples into an optimizer step; its rows of 512 tokens need the "
    "T x T mask of padding_free here, which is tried",
    "use_liger_kernel, use_kernels": "Triton kernels, fetched from a hub: a GPU and a network",
    "activation_offloading, selective checkpointing": "save memory and cost time",
    "loss_type": "'nll' is the loss that is compared; 'chunked_nll' is its deprecated alias and "
    "'dft' is another objective",
    "torch_compile": "not advised for it by TRL; compiles again for each padded length, minutes on "
    "two cores",
}
"""Settings of TRL 1.16 that were not tried, and why."""


def tuned_pair(candidate: str) -> dict[str, Contender]:
    """Returns the best-tuned TRL, without and with our system settings."""
    chosen = TUNED[candidate]
    return {
        "trl-tuned": replace(chosen, label=f"TRL tuned: checkpointing off, {chosen.label}"),
        "trl-tuned-system": replace(
            chosen, label="TRL tuned, with our allocator and oneDNN settings", system=True
        ),
    }


def run_contender(contender: Contender, work: Workload) -> Rows:
    """Returns the rows of a block trained with the contender's loop."""
    disable_progress_bars()
    if contender.system:
        keep_large_blocks()
        torch.set_float32_matmul_precision("medium")
    return contender.loop(work)
