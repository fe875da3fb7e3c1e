"""Runs outside a study, read as a study of one arm for the same tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracle.config.files import read_yaml
from loracle.placement.inventory import Inventory, LinearModule
from loracle.placement.plan import ModulePlan, most_common_rank
from loracle.records.files import read_json
from loracle.records.find_runs import completed_runs, read_results
from loracle.records.names import CONFIG, MODULES
from loracle.records.result import read_result
from loracle.records.study_folder import ArmRecord, RunRecord, StudyRecord


def study_of_runs(root: Path) -> StudyRecord:
    """Returns the completed runs of a folder: one run, or several seeds of one configuration.

    The inventory holds adapted modules only: a run does not record the others.

    Raises:
        RunFolderError: If there is none, or they differ in more than the seed.
    """
    read_results(root)
    folders = list(completed_runs(root))
    config = read_yaml(folders[0] / CONFIG)
    plan = ModulePlan.from_json(read_json(folders[0] / MODULES))
    runs = sorted((_run(folder, plan.placement) for folder in folders), key=lambda run: run.seed)
    rank, alpha = most_common_rank(plan)
    arm = ArmRecord(
        name=plan.placement,
        placement=plan.placement,
        rank=rank,
        alpha=alpha,
        trainable_params=plan.trainable_params,
        budget_gap_frac=None,
        modules=tuple(plan.to_json()["modules"]),
    )
    return StudyRecord(
        path=root,
        name=root.name,
        study=_study(plan.placement, config=config, seeds=[run.seed for run in runs]),
        arms=(arm,),
        runs=tuple(runs),
        unfinished=(),
        search=(),
        inventory=_inventory(plan),
        scores={},
    )


def _study(arm: str, *, config: Mapping[str, Any], seeds: list[int]) -> dict[str, Any]:
    return {
        "question": f"What does LoRA on {arm} buy, and what does it cost?",
        "reference": arm,
        "budget": "equal-rank",
        "seeds": seeds,
        "config": dict(config),
    }


def _run(folder: Path, arm: str) -> RunRecord:
    result = read_result(folder)
    config = read_yaml(folder / CONFIG)
    return RunRecord(
        id=folder.name,
        arm=arm,
        seed=result.seed,
        role="arm",
        learning_rate=config["train"]["learning_rate"],
        path=folder,
        result=result,
    )


def _inventory(plan: ModulePlan) -> Inventory:
    layers = [module.layer for module in plan.modules if module.layer is not None]
    return Inventory(
        modules=tuple(
            LinearModule(
                name=module.name,
                kind=module.kind,
                layer=module.layer,
                in_features=module.in_features,
                out_features=module.out_features,
                role="other",
                fan_in_fan_out=module.fan_in_fan_out,
            )
            for module in plan.modules
        ),
        num_layers=1 + max(layers, default=0),
        total_params=plan.base_params,
    )
