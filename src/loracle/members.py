"""The runs that are to be done on a base, and which of them begin from kept hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracle.config import Config
from loracle.data import Example
from loracle.errors import RunFolderError
from loracle.isolated import num_probed_steps
from loracle.model.inventory import inventory_of
from loracle.model.trunk import lowest_layer
from loracle.placement import Inventory, ModulePlan, resolve_placement
from loracle.record import RunFolder
from loracle.schedule import DataOrder
from loracle.workbench import Workbench, fill_trunk, open_trunk

# assumed: computing a state alone costs more than in a row, and keeping it costs too
_USES_THAT_PAY = 2.0


@dataclass(frozen=True)
class Member:
    """A run that is to be done: where, what, and the modules that its placement comes to."""

    folder: RunFolder
    config: Config
    arm: str
    """What its results call its placement."""
    plan: ModulePlan
    lowest_layer: int
    """First decoder layer with an adapter."""
    trunk_layer: int
    """The same if states below it are kept; 0: they are not."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What is recorded about how it came to be."""


def enlist(
    bench: Workbench,
    folders: Sequence[RunFolder],
    *,
    arms: Mapping[Path, str | None],
    notes: Mapping[Path, Mapping[str, Any]] | None = None,
) -> list[Member]:
    """Returns the runs of these folders.

    Args:
        bench: The base and its data.
        folders: One per run.
        arms: What their results call their placements; None: by the placement's label.
        notes: What is recorded about how they came to be.

    Raises:
        UsageError: If a placement is not one of this model, or a run to go on with would not see
            what it saw before.
    """
    inventory = inventory_of(bench.base.model)
    plans = [_plan(folder.config, inventory=inventory) for folder in folders]
    lowest = [lowest_layer(plan, base=bench.base) for plan in plans]
    begins = [
        layer if layer and bench.base.has_trunk and trunk_pays(bench, folder.config) else 0
        for folder, layer in zip(folders, lowest, strict=True)
    ]
    if layers := {layer for layer in begins if layer > 0}:
        open_trunk(bench, num_layers=len(layers))
    found = [
        Member(
            folder=folder,
            config=folder.config,
            arm=arms.get(folder.path) or plan.placement,
            plan=plan,
            lowest_layer=layer,
            trunk_layer=begin if bench.trunk else 0,
            notes=(notes or {}).get(folder.path, {}),
        )
        for folder, plan, layer, begin in zip(folders, plans, lowest, begins, strict=True)
    ]
    for member in found:
        if not member.folder.is_finished:
            _require_same_inputs(bench, member)
    return found


def _plan(config: Config, *, inventory: Inventory) -> ModulePlan:
    lora = config.lora
    plan = resolve_placement(lora.placement, inventory=inventory, rank=lora.rank, alpha=lora.alpha)
    plan.require_trainable(quantization=config.quantization)
    return plan


def trunk_pays(bench: Workbench, config: Config) -> bool:
    """Returns whether a run uses the states of its examples often enough to keep them.

    Asked of the run alone, so that what an arm costs does not depend on what it trains with.
    """
    if config.train.trunk == "off":
        return False
    taken = config.train.max_steps * config.train.batch_size
    every = config.eval.every_steps
    validations = (config.train.max_steps // every if every else 0) + 1
    scored = len(bench.scored)
    distinct = min(taken, len(bench.data.train)) + scored
    return taken + validations * scored >= _USES_THAT_PAY * distinct


def fill_for(bench: Workbench, members: Sequence[Member]) -> None:
    """Computes the states that these runs begin from, together and each alone."""
    together = min(member.trunk_layer for member in members)
    for member in members:
        examples = examples_seen(bench, member.config)
        for layer in sorted({together, member.trunk_layer} - {0}):
            fill_trunk(bench, examples, layer=layer)


def examples_seen(bench: Workbench, config: Config) -> list[Example]:
    """Returns every example that the run, or its probe, trains or is scored on, once."""
    order = DataOrder(bench.data.train, batch_size=config.train.batch_size, seed=config.seed)
    steps = max(config.train.max_steps, num_probed_steps(config))
    seen = {id(one): one for step in range(steps) for one in order.batch(step)}
    return [one for one in bench.data.train if id(one) in seen] + list(bench.scored)


def _require_same_inputs(bench: Workbench, member: Member) -> None:
    """Checks that a run to go on with would see the same data and train the same modules.

    Raises:
        RunFolderError: If it would not.
    """
    folder = member.folder
    if not (folder.path / "modules.json").exists():
        return
    before = folder.read_json("data.json")["fingerprint"]
    if before != bench.data.fingerprint:
        raise RunFolderError(
            f"{folder.path.name}: the data changed since the run began (fingerprint {before}, "
            f"now {bench.data.fingerprint}); restore it or start a new run"
        )
    if folder.read_json("modules.json") != member.plan.to_json():
        raise RunFolderError(
            f"{folder.path.name}: the model's modules changed since the run began; start a new run"
        )
