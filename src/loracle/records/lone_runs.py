"""Runs outside a study, read as a study of one arm for the same tables and figures."""

from __future__ import annotations

from pathlib import Path

from loracle.config.files import read_yaml
from loracle.placement.inventory import Inventory, LinearModule
from loracle.placement.plan import ModulePlan, most_common_rank
from loracle.records.files import from_json, read_json
from loracle.records.find_runs import comparable_results
from loracle.records.names import CONFIG, MODULES
from loracle.records.study_folder import ArmRecord, RunRecord, StudyRecord


def study_of_runs(root: Path) -> StudyRecord:
    """Returns the completed runs of a folder: one run, or several seeds of one configuration.

    The inventory holds adapted modules only: a run does not record the others.

    Raises:
        RunFolderError: If there is none, or they differ in more than the seed.
    """
    results = comparable_results(root)
    first = next(iter(results))
    plan = ModulePlan.from_json(read_json(first / MODULES))
    runs = [
        RunRecord(
            id=folder.name,
            arm=plan.placement,
            seed=result.seed,
            role="arm",
            learning_rate=read_yaml(folder / CONFIG)["train"]["learning_rate"],
            path=folder,
            result=result,
        )
        for folder, result in results.items()
    ]
    runs.sort(key=lambda run: run.seed)
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
        study={
            "question": f"What does LoRA on {arm.name} buy, and what does it cost?",
            "reference": arm.name,
            "budget": "equal-rank",
            "seeds": [run.seed for run in runs],
            "config": read_yaml(first / CONFIG),
        },
        arms=(arm,),
        runs=tuple(runs),
        unfinished=(),
        search=(),
        inventory=Inventory(
            modules=tuple(
                from_json(LinearModule, {**module, "role": "other"}, origin=f"{root}")
                for module in arm.modules
            ),
            num_layers=1 + max((m.layer for m in plan.modules if m.layer is not None), default=0),
            total_params=plan.base_params,
        ),
        scores={},
    )
