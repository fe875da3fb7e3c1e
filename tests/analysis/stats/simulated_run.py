"""Writes the folder of one simulated run, in the contract's shape."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.stats.simulated_world import BASE_PARAMS, GAIN_NATS, LEVEL_NATS, SimulatedArm, World
from loracle.config.files import dump_yaml

_FINISHED_AT = "2026-11-23T06:24:50+00:00"


def write_run(
    folder: Path,
    run: Mapping[str, Any],
    arm: SimulatedArm,
    record: Mapping[str, Any],
    world: World,
    *,
    failed: bool,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**world.config, "seed": run["seed"]}
    write_yaml(folder / "config.yaml", config)
    write_json(folder / "environment.json", _ENVIRONMENT)
    write_json(folder / "data.json", _data(world))
    status = {
        "status": "failed" if failed else "completed",
        "phase": "train" if failed else "done",
        "step": 7 if failed else world.max_steps,
        "max_steps": world.max_steps,
        "error": "step 7: the loss is nan" if failed else None,
        "updated_at": _FINISHED_AT,
    }
    write_json(folder / "status.json", status)
    if failed:
        return
    nll = _nll_nats(run, arm, world)
    answers = _answers(arm, run["seed"], world)
    plan = {
        "placement": record["placement"],
        "base_params": BASE_PARAMS,
        "trainable_params": record["trainable_params"],
        "modules": record["modules"],
    }
    write_json(folder / "modules.json", plan)
    _write_rows(folder / "steps.jsonl", _steps(run, arm, world))
    _write_rows(folder / "evals.jsonl", _evals(nll, world))
    _write_rows(folder / "examples.jsonl", _examples(nll, answers, world))
    write_json(folder / "result.json", _result(run, arm, record, nll, answers, world))


def _nll_nats(run: Mapping[str, Any], arm: SimulatedArm, world: World) -> NDArray[np.float64]:
    """Returns the NLL of every example after training, summed over its tokens."""
    count, noise, seed = len(world.tokens), world.noise, run["seed"]
    per_token = (
        world.level_nats
        - GAIN_NATS
        + arm.effect_nats
        + world.draws("all arms", seed).normal(0, noise.seed)
        + world.draws(arm.name, seed).normal(0, noise.seed)
        + world.draws(arm.name, "examples").normal(0, noise.example, count)
        + world.draws(arm.name, seed, "both").normal(0, noise.both, count)
    )
    if run["role"] == "repeat":
        per_token = per_token + world.draws(run["id"]).normal(0, noise.repeat)
    return np.asarray(world.tokens * per_token)


def _answers(arm: SimulatedArm | None, seed: int, world: World) -> list[str]:
    """Returns the answers: some of the reference's words, by luck that the arms share."""
    name = arm.name if arm else "untuned"
    kept = arm.kept_words if arm else 0.35
    said = []
    for index, reference in enumerate(world.references[: world.num_answers]):
        words = reference.rstrip(".").split()
        luck = world.draws("luck", index).random(len(words))
        luck = luck + world.draws(name, seed, "luck", index).normal(0, 0.1, len(words))
        said.append(" ".join(w if k < kept else "thing" for w, k in zip(words, luck, strict=True)))
    if said:
        said[-1] = ""
    return said


def _steps(run: Mapping[str, Any], arm: SimulatedArm, world: World) -> list[dict[str, Any]]:
    draw = world.draws(arm.name, run["seed"], "steps")
    rows = []
    for step in range(1, world.max_steps + 1):
        done = step / world.max_steps
        loss = LEVEL_NATS - (GAIN_NATS - arm.effect_nats) * (1 - math.exp(-3 * done))
        rows.append(
            {
                "step": step,
                "epoch": step * 8 / 799,
                "loss_nats_per_token": loss + draw.normal(0, 0.05),
                "learning_rate": 3e-4 * 0.5 * (1 + math.cos(math.pi * done)),
                "grad_norm": float(draw.uniform(0.3, 0.5)),
                "num_tokens": 1600,
                "num_targets": 1200,
                "step_time_s": (arm.step_time_s or 1.0) * float(draw.uniform(0.9, 1.1)),
                "clocked": step > 3,
            }
        )
    return rows


def _evals(nll: NDArray[np.float64], world: World) -> list[dict[str, Any]]:
    base, middle = world.base_nll_nats, world.max_steps // 2
    at = {0: base, middle: 0.3 * base + 0.7 * nll, world.max_steps: nll}
    return [
        {
            "step": step,
            "model": "tuned" if step else "base",
            **_likelihood(sums, world),
            "nll_sum_nats": sums.tolist(),
        }
        for step, sums in at.items()
    ]


def _examples(
    nll: NDArray[np.float64], answers: Sequence[str], world: World
) -> list[dict[str, Any]]:
    untuned = _answers(None, 0, world)
    rows = []
    for index, reference in enumerate(world.references):
        answered = index < len(answers)
        rows.append(
            {
                "row": 3 * index,
                "instruction": f"Write sentence {index}.",
                "input": "",
                "reference": reference,
                "tokens": int(world.tokens[index]),
                "nll_sum_nats": float(nll[index]),
                "base_nll_sum_nats": float(world.base_nll_nats[index]),
                "generated": answers[index] if answered else None,
                "base_generated": untuned[index] if answered else None,
                "hit_limit": False if answered else None,
                "base_hit_limit": True if answered else None,
            }
        )
    return rows


def _likelihood(nll: NDArray[np.float64], world: World) -> dict[str, Any]:
    loss = math.fsum(nll) / int(world.tokens.sum())
    return {
        "loss_nats_per_token": loss,
        "perplexity": math.exp(loss),
        "num_examples": len(nll),
        "num_targets": int(world.tokens.sum()),
    }


def _quality(nll: NDArray[np.float64], answers: Sequence[str], world: World) -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
    references = [list(world.references[: len(answers)])]
    return {
        **_likelihood(nll, world),
        "bleu": bleu.corpus_score(answers, references).score if answers else None,
        "bleu_signature": str(bleu.get_signature()) if answers else None,
        "chrf": chrf.corpus_score(answers, references).score if answers else None,
        "chrf_signature": str(chrf.get_signature()) if answers else None,
        "num_answers": len(answers) or None,
        "hit_limit_frac": 0.0 if answers else None,
    }


def _result(
    run: Mapping[str, Any],
    arm: SimulatedArm,
    record: Mapping[str, Any],
    nll: NDArray[np.float64],
    answers: Sequence[str],
    world: World,
) -> dict[str, Any]:
    return {
        "schema": 1,
        "status": "completed",
        "signature": f"simulated|placement:{record['placement']}|seed:{run['seed']}",
        "arm": record["placement"],
        "placement": record["placement"],
        "seed": run["seed"],
        "finished_at": _FINISHED_AT,
        "device": "simulated CPU",
        "quality": {
            "base": _quality(world.base_nll_nats, _answers(None, 0, world), world),
            "tuned": _quality(nll, answers, world),
        },
        "efficiency": _efficiency(run, arm, record, world),
        "criteria": {
            "convergence": {"passed": True, "evidence": "Training loss fell from 1.8 to 1.6."},
            "validation": {"passed": True, "evidence": "Perplexity 6.0 -> 5.0."},
            "efficiency": {"passed": True, "evidence": "Few of the parameters train."},
            "reproducibility": {"passed": None, "evidence": "No other run with this signature."},
        },
        "audit": _audit(len(record["modules"]), record["trainable_params"]),
        "adapter_sha256": hashlib.sha256(f"{arm.name}|{run['seed']}".encode()).hexdigest(),
    }


def _audit(num_modules: int, trainable_params: int) -> dict[str, Any]:
    return {
        "updated_modules": num_modules,
        "planned_modules": num_modules,
        "frozen_weights_unchanged": True,
        "trainable_params": trainable_params,
        "planned_params": trainable_params,
        "saved_tensors_exact": True,
        "reloaded_loss_nats_per_token": 1.6,
        "recorded_loss_nats_per_token": 1.6,
        "reloaded_examples": 32,
        "relative_tolerance": 0.001,
        "reload_difference": 0.0,
        "faults": [],
    }


def _efficiency(
    run: Mapping[str, Any], arm: SimulatedArm, record: Mapping[str, Any], world: World
) -> dict[str, Any]:
    wobble = 1 + world.draws(run["id"], "wobble").normal(0, 0.01)
    time = arm.step_time_s and arm.step_time_s * wobble
    memory = arm.peak_memory_gib and arm.peak_memory_gib * (1 + (wobble - 1) / 4)
    latency = arm.latency_ms and arm.latency_ms * wobble
    params = record["trainable_params"]
    total = BASE_PARAMS + (0 if arm.is_full else params)
    return {
        "measured": "whole run, alone",
        "trainable_params": params,
        "total_params": total,
        "trainable_frac": params / total,
        "full_finetune_params": BASE_PARAMS,
        "step_time_s": {
            "median": time,
            "p25": time and 0.9 * time,
            "p75": time and 1.1 * time,
            "num_steps": world.max_steps - 3 if time else 0,
        },
        "epoch_time_s": time and time * 799 / 8,
        "steps_per_epoch": 799 / 8,
        "throughput_tokens_per_s": time and 1600 / time,
        "peak_memory_gib": {
            "kind": "resident_set",
            "load": 1.2,
            "train": memory,
            "evaluate": 3.4,
            "generate": 2.1,
            "reserved": None,
        },
        "latency_ms_per_token": {"base": 45.6, "unmerged": latency, "merged": 45.7},
        "latency_first_token_ms": {"base": 133.0, "unmerged": 177.0, "merged": 130.0},
        "trunk": None,
    }


def _data(world: World) -> dict[str, Any]:
    tokens = int(world.tokens.sum())
    part = {"num_truncated": 0, "tokens_per_example": {}}
    return {
        "source": "simulated",
        "revision": "none",
        "template": {"name": "alpaca", "digest": "832d55b5e303"},
        "max_tokens": 512,
        "max_records": None,
        "split_seed": 0,
        "validation_frac_asked": 0.2,
        "fingerprint": "d0798cfebd0d2c34",
        "num_records_read": 799 + len(world.tokens),
        "num_records_used": 799 + len(world.tokens),
        "dropped": {},
        "recurring_instructions": {"num_groups": 0, "num_records": 0},
        "validation_frac": len(world.tokens) / (799 + len(world.tokens)),
        "train": {"num_examples": 799, "num_tokens": 163088, "num_targets": 120106, **part},
        "validation": {
            "num_examples": len(world.tokens),
            "num_tokens": tokens + 54 * len(world.tokens),
            "num_targets": tokens,
            **part,
        },
    }


_ENVIRONMENT = {
    "schema": 1,
    "captured_at": "2026-11-23T06:15:08+00:00",
    "loracle": {"version": "0.1.0", "commit": "0" * 40, "dirty": False},
    "python": "3.11.7",
    "platform": {"system": "Linux", "release": "6.0", "machine": "x86_64"},
    "cpu": {"model": "simulated CPU", "logical_cores": 2, "usable_cores": 2},
    "memory_gib": 16.0,
    "device": {"name": "simulated CPU", "dtype": "bfloat16"},
    "gpus": [],
    "cuda": None,
    "packages": {"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"},
}


def write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(dump_yaml(tree), encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
