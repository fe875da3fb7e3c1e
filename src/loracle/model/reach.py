"""Proves, before training, that what is about to be trained is reached and gets a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from loracle.data.packing import PackedRow, pack
from loracle.errors import ModelError
from loracle.model.adapters import Adapter, attach_adapter
from loracle.model.base import FrozenBase, Probe
from loracle.model.faults import model_faults
from loracle.model.guard import probe_ids
from loracle.model.layers.routing import Route
from loracle.placement import ModulePlan
from loracle.text import listed

# assumed: enough tokens that a few experts of each layer are chosen
_TOKENS = 32


@contextmanager
def on_trial(base: FrozenBase, *, plan: ModulePlan) -> Iterator[Adapter]:
    """Puts the plan's adapter on the base inside the block; the base must have none.

    Raises:
        ModelError: If PEFT cannot, or not on exactly the plan's modules.
    """
    try:
        with peft_faults(base, plan=plan):
            adapter = attach_adapter(
                base, name="default", plan=plan, dropout=0.1, seed=0, model_source="trial"
            )
        yield adapter
    finally:
        if base.peft is not None:
            base.peft.unload()
            base.peft = None


def peft_faults(base: FrozenBase, *, plan: ModulePlan) -> AbstractContextManager[None]:
    """Returns a context that says in one line that PEFT cannot adapt what the plan names."""
    name = type(base.model).__name__
    return model_faults(f"{name}: PEFT cannot adapt what '{plan.placement}' names")


def require_reached(base: FrozenBase, *, plan: ModulePlan) -> None:
    """Checks with a row of a few tokens that everything that the plan trains takes part.

    Raises:
        ModelError: Naming what text never reaches, or what gets no gradient.
    """
    ids = probe_ids(base, count=_TOKENS)
    # Two sequences, each with a route: a layer that sees other rows than these is found out.
    halves = [Probe(ids[: _TOKENS // 2]), Probe(ids[_TOKENS // 2 :])]
    row = pack(halves, device=base.device)
    name = type(base.model).__name__
    what = f"{name}: cannot train '{plan.placement}'"
    if plan.is_full:
        with model_faults(what), torch.inference_mode():
            idle = _never_run(base, row)
        _refuse(idle, name=name, plan=plan, why="text never reaches")
        return
    with on_trial(base, plan=plan) as adapter:
        with model_faults(what):
            gradients = _gradients(base, row, adapter=adapter)
        idle = [key for key, grad in gradients.items() if not _moves(grad)]
        require_gradients(base, idle=idle, plan=plan)


def require_gradients(base: FrozenBase, *, idle: Sequence[str], plan: ModulePlan) -> None:
    """Raises ModelError for factors B of the plan's adapter that a pass gave no gradient."""
    modules = [key.removesuffix(".lora_B") for key in idle]
    why = "a pass over text gives no gradient to"
    _refuse(modules, name=type(base.model).__name__, plan=plan, why=why)


def _refuse(idle: Sequence[str], *, name: str, plan: ModulePlan, why: str) -> None:
    if idle:
        raise ModelError(
            f"{name}: {why} {listed(idle)}, which '{plan.placement}' trains; leave them out of "
            "lora.placement"
        )


def _never_run(base: FrozenBase, row: PackedRow) -> list[str]:
    """Returns the modules with weights of their own that a forward pass does not call."""
    owners = {
        module: name
        for name, module in base.model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _args: called.add(module))
        for module in owners
    ]
    try:
        base.nll_from_logits(row)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for module, name in owners.items() if module not in called]


def _gradients(base: FrozenBase, row: PackedRow, *, adapter: Adapter) -> dict[str, Tensor | None]:
    """Returns the gradient of every B; that of A is zero, because B is."""
    factors = {k: p for k, p in adapter.parameters.items() if k.endswith(".lora_B")}
    first, _ = row.lengths
    routes = [Route(adapter.name, 0, first), Route(adapter.name, first, row.num_tokens)]
    loss = base.token_nll(row, routes=routes).sum()
    found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return dict(zip(factors, found, strict=True))


def _moves(gradient: Tensor | None) -> bool:
    if gradient is None:
        return False
    # Without the scale of training, a gradient in fp16 can underflow.
    return gradient.dtype == torch.float16 or bool((gradient != 0).any())
