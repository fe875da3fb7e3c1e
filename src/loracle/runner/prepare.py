"""Runs made ready to start: placements resolved, inputs checked, kept states computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loracle.config.run import Config, num_probed_steps
from loracle.engine.out_of_memory import free_memory
from loracle.errors import RunFolderError
from loracle.model.faults import is_out_of_memory
from loracle.model.inventory import inventory_of
from loracle.model.reach import require_reached
from loracle.model.trunk import lowest_layer
from loracle.placement import Inventory, ModulePlan, resolve_placement
from loracle.records.names import MODULES
from loracle.records.run_folder import RunFolder
from loracle.runner.run_spec import RunSpec
from loracle.runner.same_inputs import require_same_base, require_same_data
from loracle.runner.shared_base import SharedBase
from loracle.runner.trunk import examples_seen


@dataclass(frozen=True)
class PreparedRun:
    """A run ready to start: its request, open folder, and its resolved modules."""

    spec: RunSpec
    folder: RunFolder
    plan: ModulePlan
    lowest_layer: int
    """First decoder layer with an adapter."""
    trunk_layer: int
    """First decoder layer that its steps compute; 0: they begin at the tokens."""

    @property
    def config(self) -> Config:
        """Its resolved configuration."""
        return self.folder.config

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.path.name

    @property
    def arm(self) -> str:
        """Name of its placement in the results."""
        return self.spec.arm or self.plan.placement


def prepare_runs(
    shared: SharedBase, specs: Sequence[RunSpec], *, folders: Sequence[RunFolder]
) -> list[PreparedRun]:
    """Returns the runs in the order given, and opens the trunk that they begin at.

    Raises:
        UsageError: If a placement is not one of this model, or a run to resume would not see what
            it saw before.
    """
    _require_same_inputs(shared, specs, folders=folders)
    inventory = inventory_of(shared.base.model)
    plans = [_plan(folder.config, inventory=inventory) for folder in folders]
    for plan in {frozenset(m.name for m in plan.modules): plan for plan in plans}.values():
        _require_reached(shared, plan=plan)
    layers = shared.open_trunk(
        [(folder.config, plan) for folder, plan in zip(folders, plans, strict=True)]
    )
    prepared = [
        PreparedRun(spec, folder, plan, lowest_layer(plan, base=shared.base), layer)
        for spec, folder, plan, layer in zip(specs, folders, plans, layers, strict=True)
    ]
    for run in prepared:
        if not run.folder.is_finished:
            _require_same_modules(run)
    return prepared


def _require_reached(shared: SharedBase, *, plan: ModulePlan) -> None:
    """Tries a pass over a few tokens; for one that does not fit, the run says so, or recovers."""
    try:
        require_reached(shared.base, plan=plan)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        free_memory()


def _require_same_inputs(
    shared: SharedBase, specs: Sequence[RunSpec], *, folders: Sequence[RunFolder]
) -> None:
    """Raises unless the runs that have begun, finished ones too, have the base and data here."""
    begun = [folder.path for folder in folders if folder.has(MODULES)]
    known = list(dict.fromkeys([*begun, *(path for spec in specs for path in spec.beside)]))
    now = shared.environment
    require_same_base(known, now=now, notice=shared.progress.notice)
    require_same_data(known, data=shared.data, now=now)


def _plan(config: Config, *, inventory: Inventory) -> ModulePlan:
    lora = config.lora
    plan = resolve_placement(lora.placement, inventory=inventory, rank=lora.rank, alpha=lora.alpha)
    plan.require_trainable(quantization=config.quantization)
    return plan


def fill_trunk(shared: SharedBase, runs: Sequence[PreparedRun]) -> None:
    """Computes the states that these runs begin from, together and each alone."""
    together = min(run.trunk_layer for run in runs)
    for run in runs:
        # A probe may take more steps than the run.
        steps = max(run.config.train.max_steps, num_probed_steps(run.config))
        examples = examples_seen(run.config, train=shared.data.train, steps=steps)
        shared.fill_trunk([*examples, *shared.scored], layers=[together, run.trunk_layer])


def _require_same_modules(run: PreparedRun) -> None:
    """Raises unless a run to resume would train the same modules."""
    if run.folder.has(MODULES) and run.folder.read_json(MODULES) != run.plan.to_json():
        raise RunFolderError(
            f"{run.name}: the model's modules changed since the run began; start a new run"
        )
