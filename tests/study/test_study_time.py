"""How long a study takes: products counted in closed form, corrected by runs that are finished."""

import json

import pytest

from geometries import SMOLLM2_135M
from loracle.config.files import load_config
from loracle.forecast.lengths import DataShape, data_shape
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import resolve_placement
from loracle.study.file import parse_study
from loracle.study.plan import plan_study
from loracle.study.time import backward_flops, estimate_time, forward_flops, run_seconds

INVENTORY = inventory_from_architecture(SMOLLM2_135M)
SHAPE = DataShape(tokens=200.0, targets=150.0, num_validation=200)
LAYER = 576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536
HEAD = 49152 * 576


def backward(placement, rank=16):
    plan = resolve_placement(placement, inventory=INVENTORY, rank=rank, alpha=32)
    return backward_flops(plan, inventory=INVENTORY, shape=SHAPE), plan


def plan_of(base, arms=("all-linear", "last-third"), **given):
    tree = {
        "question": "How long?",
        "reference": arms[0],
        "budget": "equal-parameters",
        "seeds": [0, 1],
        "arms": dict.fromkeys(arms),
    }
    study = parse_study(tree | given, origin="test")
    return plan_study(study, base=base, name="test", inventory=INVENTORY, scores={})


def test_a_forward_pass_multiplies_every_weight_by_every_token_and_the_head_by_targets():
    flops = forward_flops(INVENTORY, tokens=200.0, targets=150.0)
    assert flops == 2 * (200 * 30 * LAYER + 150 * HEAD)


def test_a_backward_pass_ends_at_the_lowest_adapted_layer():
    forward = forward_flops(INVENTORY, tokens=200.0, targets=150.0)
    everywhere, plan = backward("all-linear")
    assert everywhere == forward + 6 * 200 * plan.trainable_params
    late, plan = backward("last-third")
    assert late == forward - 2 * 200 * 20 * LAYER + 6 * 200 * plan.trainable_params
    head, plan = backward("lm-head")
    assert head == 2 * 150 * HEAD + 6 * 200 * plan.trainable_params
    assert backward("full")[0] == 2 * forward


def test_a_run_takes_longer_with_more_steps_validations_and_answers():
    base = load_config("demo")

    def seconds(**changed):
        train = base.train.model_copy(update=changed.get("train", {}))
        evaluate = base.eval.model_copy(update=changed.get("eval", {}))
        config = base.model_copy(update={"train": train, "eval": evaluate})
        (arm, _) = plan_of(config).arms
        return run_seconds(
            config, arm=arm, inventory=INVENTORY, shape=SHAPE, rate=lambda rows: 1e11
        )

    usual = seconds()
    assert seconds(train={"max_steps": 120}) > 1.4 * usual
    assert seconds(eval={"every_steps": 0}) < usual < seconds(eval={"every_steps": 10})
    assert seconds(eval={"generate_examples": 0}) < usual


def test_lengths_are_of_the_data_and_within_its_limits(place):
    with place.entered():
        config = load_config(place.config)
        shape = data_shape(config)
    assert 0 < shape.targets < shape.tokens <= config.data.max_tokens
    assert shape.num_validation > 0


def finish(folder, *, seconds):
    folder.mkdir(parents=True)
    began, ended = "2026-01-01T00:00:00+00:00", f"2026-01-01T00:{seconds // 60:02}:00+00:00"
    (folder / "environment.json").write_text(json.dumps({"captured_at": began}))
    (folder / "result.json").write_text(json.dumps({"finished_at": ended}))


def test_runs_that_are_finished_set_the_pace(place, tmp_path):
    with place.entered():
        base = load_config(place.config)
        plan = plan_of(base)
        rough = estimate_time(plan, out=tmp_path)
        assert rough.num_left == 4
        assert "rough" in rough.words()
        finish(tmp_path / "runs" / plan.runs[0].id, seconds=600)
        paced = estimate_time(plan, out=tmp_path)
    assert paced.num_left == 3
    assert paced.seconds_by_arm["all-linear"] == pytest.approx(600)
    assert 0 < paced.seconds_by_arm["last-third"] < 600
    assert paced.seconds_left == pytest.approx(600 + 2 * paced.seconds_by_arm["last-third"])
    assert "at the pace of 1 finished run" in paced.words()


def test_a_study_that_is_done_has_nothing_left(place, tmp_path):
    with place.entered():
        plan = plan_of(load_config(place.config))
        for run in plan.runs:
            finish(tmp_path / "runs" / run.id, seconds=60)
        assert estimate_time(plan, out=tmp_path).words() == "nothing left to run"
