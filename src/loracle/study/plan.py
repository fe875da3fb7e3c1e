"""Resolves a study's file into arms with explicit modules and runs with ids.

A run's id ends in a digest of its configuration, so a changed study runs only what is new. The
outermost loop is over seeds: an interrupted study has the same arms for every completed seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from loracle.config.run import Config, PlacementConfig, config_digest
from loracle.errors import PlacementError
from loracle.placement import Inventory, ModulePlan, resolve_placement
from loracle.placement.budget import gap_frac, rank_under
from loracle.placement.plan import FULL
from loracle.placement.selection import named_placement, random_share, select_modules_by_score
from loracle.records.study_folder import Role
from loracle.study.config import ArmConfig, RandomConfig, StrategicConfig, StudyConfig
from loracle.text import slug_of

Scores = Mapping[str, Mapping[str, float]]
"""Score name -> module name -> score."""


@dataclass(frozen=True)
class PlannedArm:
    """A placement under test, resolved for the model."""

    name: str
    """Name in the study."""
    placement: str | PlacementConfig
    """Explicit placement, as in its runs' configuration."""
    rank: int
    """r, as in its runs' configuration; full fine-tuning ignores it."""
    alpha: float
    """alpha, as in its runs' configuration."""
    learning_rate: float | None
    """Peak rate of full fine-tuning; None: the base's."""
    plan: ModulePlan
    """Modules and ranks."""
    budget_gap_frac: float | None
    """(parameters - the reference's) / the reference's; None without a budget to match."""

    def to_json(self) -> dict[str, Any]:
        """Returns the arm's entry in ``plan.json`` (`loracle.records.study_folder.ArmRecord`)."""
        return {
            "name": self.name,
            "placement": self.plan.placement,
            "rank": None if self.plan.is_full else self.rank,
            "alpha": None if self.plan.is_full else self.alpha,
            "trainable_params": self.plan.trainable_params,
            "budget_gap_frac": self.budget_gap_frac,
            "modules": self.plan.to_json()["modules"],
        }


@dataclass(frozen=True)
class PlannedRun:
    """A run of the study."""

    id: str
    """Name of its folder: arm, seed, and a digest of its configuration."""
    arm: str
    """Name of its arm."""
    seed: int
    """Seed, as in its configuration."""
    role: Role
    """``arm``: counts in the comparison."""
    config: Config
    """The resolved configuration."""

    def to_json(self) -> dict[str, Any]:
        """Returns the run's entry in ``plan.json`` (`loracle.records.study_folder.RunRecord`)."""
        return {
            "id": self.id,
            "arm": self.arm,
            "seed": self.seed,
            "role": self.role,
            "learning_rate": self.config.train.learning_rate,
        }


@dataclass(frozen=True)
class StudyPlan:
    """A fully resolved study, but for learning rates that a search still has to find."""

    name: str
    """Name of the study."""
    study: StudyConfig
    """Its configuration file."""
    base: Config
    """The configuration that all runs share."""
    inventory: Inventory
    """The model's linear layers."""
    arms: tuple[PlannedArm, ...]
    """Arms in the study's order."""
    runs: tuple[PlannedRun, ...]
    """Runs in the order of execution."""
    scores: Scores
    """Module scores that strategic arms use."""
    scores_key: str | None = None
    """Key of what they were computed from; None: there are none, or it was not recorded."""

    def study_json(self) -> dict[str, Any]:
        """Returns the content of ``study.yaml``: the file, with the base resolved."""
        given = self.study.model_dump(mode="json", exclude={"config", "base"})
        return {"name": self.name, **given, "config": self.base.model_dump(mode="json")}

    def plan_json(self) -> dict[str, Any]:
        """Returns the content of ``plan.json``."""
        return {
            "schema": 1,
            "arms": [arm.to_json() for arm in self.arms],
            "runs": [run.to_json() for run in self.runs],
            "inventory": asdict(self.inventory),
        }


def plan_study(
    study: StudyConfig, *, base: Config, name: str, inventory: Inventory, scores: Scores
) -> StudyPlan:
    """Returns the study's resolved arms and its runs.

    Raises:
        PlacementError: If a placement matches no module of this model, two arms resolve to the same
            modules and ranks, or a budget is too small for one rank.
    """
    arms = resolve_arms(study, base=base, inventory=inventory, scores=scores)
    return StudyPlan(
        name=name,
        study=study,
        base=base,
        inventory=inventory,
        arms=tuple(arms),
        runs=tuple(_runs(study, base=base, arms=arms)),
        scores=scores,
    )


def resolve_arms(
    study: StudyConfig, *, base: Config, inventory: Inventory, scores: Scores
) -> list[PlannedArm]:
    """Returns every arm with its modules and ranks.

    Raises:
        PlacementError: As `plan_study`.
    """
    placements = {
        name: explicit_placement(arm, inventory=inventory, scores=scores)
        for name, arm in study.arms.items()
    }
    rank, alpha = _with_scaling(study.arms[study.reference].rank or base.lora.rank, base=base)
    reference = resolve_placement(
        placements[study.reference], inventory=inventory, rank=rank, alpha=alpha
    )
    arms = [
        _resolve(
            name,
            arm,
            placement=placements[name],
            study=study,
            base=base,
            inventory=inventory,
            reference=reference,
        )
        for name, arm in study.arms.items()
    ]
    _require_different(arms)
    return arms


def explicit_placement(
    arm: ArmConfig, *, inventory: Inventory, scores: Scores
) -> str | PlacementConfig:
    """Returns an arm's placement; one chosen by score or at random, as a list of modules."""
    chosen = arm.placement
    if isinstance(chosen, StrategicConfig):
        return named_placement(
            select_modules_by_score(
                scores[chosen.strategic], inventory=inventory, keep_frac=chosen.keep_frac
            )
        )
    if isinstance(chosen, RandomConfig):
        return named_placement(
            random_share(inventory, seed=chosen.random, keep_frac=chosen.keep_frac)
        )
    return chosen


def _resolve(
    name: str,
    arm: ArmConfig,
    *,
    placement: str | PlacementConfig,
    study: StudyConfig,
    base: Config,
    inventory: Inventory,
    reference: ModulePlan,
) -> PlannedArm:
    rank, alpha = _with_scaling(arm.rank or base.lora.rank, base=base)
    try:
        if arm.rank is None and name != study.reference and placement != FULL:
            rank, alpha = rank_under(
                placement, inventory=inventory, reference_plan=reference, budget=study.budget
            )
        plan = resolve_placement(placement, inventory=inventory, rank=rank, alpha=alpha)
        plan.require_trainable(quantization=base.quantization)
    except PlacementError as error:
        raise PlacementError(f"arm '{name}': {error}") from None
    matched = study.budget == "equal-parameters" and not plan.is_full
    gap = gap_frac(plan, reference_plan=reference) if matched else None
    return PlannedArm(
        name=name,
        placement=placement,
        rank=rank,
        alpha=alpha,
        learning_rate=study.full.learning_rate if study.full and plan.is_full else None,
        plan=plan,
        budget_gap_frac=gap,
    )


def _with_scaling(rank: int, *, base: Config) -> tuple[int, float]:
    """Returns a rank and its alpha; alpha / r is the base's, so that updates are scaled alike."""
    return rank, rank * base.lora.alpha / base.lora.rank


def _require_different(arms: Sequence[PlannedArm]) -> None:
    seen: dict[Any, str] = {}
    for arm in arms:
        key = tuple((module.name, module.rank, module.alpha) for module in arm.plan.modules)
        if key in seen:
            raise PlacementError(
                f"arms '{seen[key]}' and '{arm.name}' are the same: each has "
                f"{len(arm.plan.modules)} modules with the same ranks; leave one out"
            )
        seen[key] = arm.name


def _runs(study: StudyConfig, *, base: Config, arms: Sequence[PlannedArm]) -> Iterator[PlannedRun]:
    for seed in study.seeds:
        for arm in arms:
            yield planned_run(arm, base=base, seed=seed, role="arm")
    reference = next(arm for arm in arms if arm.name == study.reference)
    for turn in range(study.noise.repeats):
        run = planned_run(reference, base=base, seed=study.seeds[0], role="repeat")
        yield replace(run, id=f"{run.id}-repeat{turn + 1}")
    for seed in study.noise.extra_seeds:
        yield planned_run(reference, base=base, seed=seed, role="extra-seed")


def planned_run(
    arm: PlannedArm,
    *,
    base: Config,
    seed: int,
    role: Role,
    learning_rate: float | None = None,
) -> PlannedRun:
    """Returns the run of an arm with a seed; ``learning_rate`` defaults to the arm's or base's."""
    changes = {"placement": arm.placement, "rank": arm.rank, "alpha": arm.alpha}
    rate = learning_rate or arm.learning_rate
    train = base.train if rate is None else base.train.model_copy(update={"learning_rate": rate})
    config = base.model_copy(
        update={"seed": seed, "lora": base.lora.model_copy(update=changes), "train": train}
    )
    digest = config_digest(config)[:8]
    return PlannedRun(f"{slug_of(arm.name)}-s{seed}-{digest}", arm.name, seed, role, config)
