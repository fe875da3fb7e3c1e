"""The runs that are to be done on a base, and which of them begin from kept hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracle.config.run import Config
from loracle.errors import RunFolderError
from loracle.model.inventory import inventory_of
from loracle.model.trunk import lowest_layer
from loracle.placement import Inventory, ModulePlan, resolve_placement
from loracle.records.run_folder import RunFolder
from loracle.runner.shared_base import Workbench
from loracle.runner.trunk import examples_seen, fill_trunk, open_trunk, trunk_pays


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


def fill_for(bench: Workbench, members: Sequence[Member]) -> None:
    """Computes the states that these runs begin from, together and each alone."""
    together = min(member.trunk_layer for member in members)
    for member in members:
        examples = examples_seen(bench, member.config)
        for layer in sorted({together, member.trunk_layer} - {0}):
            fill_trunk(bench, examples, layer=layer)


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
