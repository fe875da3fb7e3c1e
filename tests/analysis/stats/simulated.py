"""Studies with known effects on the disk, in the contract's shape, without a model.

The loss of a validation example of n tokens is n times (level of the example + effect of the arm
+ noise of the example, of the seed, and of both), so that what a study should find is known.
Import it as ``from analysis.stats.simulated import write_study``; the tests folder is on the path.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from analysis.stats.simulated_run import write_json, write_run, write_yaml
from analysis.stats.simulated_world import (
    ALL_LINEAR,
    ATTENTION,
    BASE_PARAMS,
    FEED_FORWARD,
    Noise,
    SimulatedArm,
    World,
    make_world,
)
from loracle.placement.inventory import LinearModule
from loracle.records.study_folder import StudyRecord, read_study

__all__ = ["ARMS", "Noise", "SimulatedArm", "changed", "simulated_study", "write_study"]

_FEATURES = {  # SmolLM2-135M's
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}


ARMS = (
    SimulatedArm("all-linear"),
    SimulatedArm(
        "attention", 0.03, kinds=ATTENTION, kept_words=0.46, step_time_s=3.1, peak_memory_gib=4.1
    ),
    SimulatedArm(
        "attention-qv",
        0.05,
        kinds=("q_proj", "v_proj"),
        kept_words=0.42,
        step_time_s=2.8,
        peak_memory_gib=3.9,
        latency_ms=49.0,
    ),
    SimulatedArm("feed-forward", 0.001, kinds=FEED_FORWARD, step_time_s=3.3, peak_memory_gib=4.4),
    SimulatedArm("first-third", 0.02, thirds=(0,), step_time_s=3.2, latency_ms=50.0),
    SimulatedArm("middle-third", 0.01, thirds=(1,), step_time_s=2.7, peak_memory_gib=3.8),
    SimulatedArm("last-third", 0.04, thirds=(2,), step_time_s=2.1, peak_memory_gib=3.0),
    SimulatedArm("strategic", -0.012, kinds=("v_proj", "o_proj", "down_proj"), kept_words=0.53),
    SimulatedArm("random", 0.012, every=4, kept_words=0.48, step_time_s=3.5),
)


def simulated_study(folder: Path, **options: Any) -> StudyRecord:
    """Returns the study that ``write_study`` wrote."""
    return read_study(write_study(folder, **options))


def write_study(
    folder: Path,
    *,
    arms: Sequence[SimulatedArm] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    num_examples: int = 60,
    num_answers: int = 20,
    num_layers: int = 6,
    max_steps: int = 30,
    repeats: int = 1,
    extra_seeds: Sequence[int] = (3, 4),
    unfinished: Sequence[tuple[str, int]] = (),
    noise: Noise | None = None,
    scores: bool = True,
    searched: bool = True,
    draw_seed: int = 0,
) -> Path:
    """Writes a study whose first arm is the reference; same arguments, same bytes.

    Args:
        folder: Created if it is not there.
        arms: What is compared, the reference first.
        seeds: Seeds of every arm.
        num_examples: Validation examples.
        num_answers: Of them, those with an answer; 0: no BLEU.
        num_layers: Blocks of the model.
        max_steps: Steps of a run.
        repeats: Runs of the reference's first seed again.
        extra_seeds: Seeds that only the reference has.
        unfinished: Arms and seeds whose run failed.
        noise: Standard deviations; None: those of ``Noise``.
        scores: Whether modules were scored.
        searched: Whether a rate was searched for each arm; all took the same one.
        draw_seed: Another one, another world.
    """
    inventory = _inventory(num_layers)
    records = _arm_records(arms, inventory)
    world = make_world(
        num_examples, num_answers=num_answers, max_steps=max_steps, noise=noise, seed=draw_seed
    )
    planned = _planned(arms, seeds=seeds, repeats=repeats, extra_seeds=extra_seeds)
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(
        folder / "study.yaml",
        {
            "name": "simulated",
            "question": "Which placement learns most for the parameters it trains?",
            "reference": arms[0].name,
            "budget": "equal-parameters",
            "seeds": list(seeds),
            "arms": {arm.name: {"placement": arm.name} for arm in arms},
            "noise": {"repeats": repeats, "extra_seeds": list(extra_seeds)},
            "search": {"learning_rates": [1e-4, 3e-4, 1e-3], "seed": 99} if searched else None,
            "config": dict(world.config),
        },
    )
    plan = {
        "schema": 1,
        "arms": records,
        "runs": planned,
        "inventory": {
            "modules": [asdict(module) for module in inventory],
            "num_layers": num_layers,
            "total_params": BASE_PARAMS,
        },
    }
    write_json(folder / "plan.json", plan)
    if scores:
        write_json(folder / "scores.json", {"schema": 1, "scores": _scores(inventory, world)})
    by_name = {arm.name: (arm, record) for arm, record in zip(arms, records, strict=True)}
    for run in planned:
        failed = (run["arm"], run["seed"]) in unfinished and run["role"] == "arm"
        write_run(folder / "runs" / run["id"], run, *by_name[run["arm"]], world, failed=failed)
    return folder


def _planned(
    arms: Sequence[SimulatedArm],
    *,
    seeds: Sequence[int],
    repeats: int,
    extra_seeds: Sequence[int],
) -> list[dict[str, Any]]:
    reference = arms[0].name
    wanted = [(arm.name, seed, "arm", "") for seed in seeds for arm in arms]
    wanted += [(reference, seeds[0], "repeat", f"-again-{n + 1}") for n in range(repeats)]
    wanted += [(reference, seed, "extra-seed", "") for seed in extra_seeds]
    return [
        {
            "id": f"{arm}-seed-{seed}{suffix}",
            "arm": arm,
            "seed": seed,
            "role": role,
            "learning_rate": 3e-4,
        }
        for arm, seed, role, suffix in wanted
    ]


def _inventory(num_layers: int) -> list[LinearModule]:
    return [
        LinearModule(
            name=f"model.layers.{layer}.{'self_attn' if kind in ATTENTION else 'mlp'}.{kind}",
            kind=kind,
            layer=layer,
            in_features=_FEATURES[kind][0],
            out_features=_FEATURES[kind][1],
            role="attention" if kind in ATTENTION else "feed-forward",
        )
        for layer in range(num_layers)
        for kind in ALL_LINEAR
    ]


def _arm_records(
    arms: Sequence[SimulatedArm], inventory: Sequence[LinearModule]
) -> list[dict[str, Any]]:
    """Resolves the arms at equal parameters: the first has rank 16."""
    chosen = [[] if arm.is_full else _chosen(arm, inventory) for arm in arms]
    per_rank = [sum(m.in_features + m.out_features for m in modules) for modules in chosen]
    budget = 16 * (per_rank[0] or sum(m.in_features + m.out_features for m in inventory))
    found = []
    for arm, modules, each in zip(arms, chosen, per_rank, strict=True):
        rank = (arm.rank or max(1, round(budget / each))) if each else None
        params = rank * each if rank else BASE_PARAMS
        found.append(
            {
                "name": arm.name,
                "placement": "full" if arm.is_full else arm.name,
                "rank": rank,
                "alpha": 2.0 * rank if rank else None,
                "trainable_params": params,
                "budget_gap_frac": (params - budget) / budget if rank else None,
                "modules": [_planned_module(module, rank or 1) for module in modules],
            }
        )
    return found


def _chosen(arm: SimulatedArm, inventory: Sequence[LinearModule]) -> list[LinearModule]:
    num_layers = 1 + max(module.layer or 0 for module in inventory)
    inside = [
        module
        for module in inventory
        if module.kind in arm.kinds and 3 * (module.layer or 0) // num_layers in arm.thirds
    ]
    return inside[:: arm.every]


def _planned_module(module: LinearModule, rank: int) -> dict[str, Any]:
    return {
        "name": module.name,
        "rank": rank,
        "alpha": 2.0 * rank,
        "in_features": module.in_features,
        "out_features": module.out_features,
        "layer": module.layer,
        "kind": module.kind,
        "fan_in_fan_out": False,
        "trainable_params": rank * (module.in_features + module.out_features),
    }


def _scores(inventory: Sequence[LinearModule], world: World) -> dict[str, dict[str, float]]:
    draw = world.draws("scores")
    return {
        name: {module.name: float(draw.lognormal(0, 1)) for module in inventory}
        for name in ("gradient-energy", "feature-norm")
    }


def changed(arm: str, **changes: Any) -> tuple[SimulatedArm, ...]:
    """Returns ``ARMS`` with one of them changed."""
    return tuple(replace(each, **changes) if each.name == arm else each for each in ARMS)
