"""The result is what was measured: every figure in its place, what was not measured null."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from loracle.config.files import load_config
from loracle.data import Example, Record
from loracle.engine.answers import Answer, TextScore
from loracle.engine.evaluate import ExampleScore
from loracle.engine.latency import Latency
from loracle.engine.measure import MemoryMeter
from loracle.placement import ModulePlan, PlannedModule
from loracle.records.files import to_json
from loracle.records.result import Audit, ByAdapterState, PeakMemory, RunResult, StepTime, Trunk
from loracle.runner.criteria import Repeat
from loracle.runner.result import Measured, build_result, example_rows
from loracle.runner.trunk import TrunkUse
from tiny_engine import CPU

BASE = [ExampleScore(10, 20.0), ExampleScore(30, 45.0)]
TUNED = [ExampleScore(10, 15.0), ExampleScore(30, 33.0)]
TEXT = TextScore(12.5, "nrefs:1|v", 30.25, "nrefs:1|w", 0.25, 4)
PLAN = ModulePlan("all-linear", (PlannedModule("a.q", 2, 4.0, 10, 10, 0, "q"),), base_params=960)
AUDIT = Audit(
    updated_modules=1,
    planned_modules=1,
    frozen_weights_unchanged=True,
    trainable_params=40,
    planned_params=40,
    saved_tensors_exact=True,
    reloaded_loss_nats_per_token=1.2,
    recorded_loss_nats_per_token=1.2,
    reloaded_examples=2,
    relative_tolerance=1e-5,
)


def step_rows(count: int = 20) -> list[dict[str, object]]:
    return [
        {
            "clocked": step > 2,
            "step_time_s": 0.5 if step % 2 else 1.5,
            "num_tokens": 100,
            "loss_nats_per_token": 3 - step / count,
        }
        for step in range(count)
    ]


def measured(**changes: object) -> Measured:
    memory = MemoryMeter(CPU)
    memory.peaks_gib |= {"load": 1.0, "train": 2.5}
    whole = Measured(
        base_scores=BASE,
        tuned_scores=TUNED,
        base_text=replace(TEXT, bleu=2.0),
        tuned_text=TEXT,
        step_rows=step_rows(),
        probed_rows=None,
        trunk=None,
        memory=memory,
        latency={"base": Latency(5.0, 2.0), "unmerged": Latency(6.0, 3.0), "merged": None},
        audit=AUDIT,
        adapter_sha256="ab" * 32,
    )
    return replace(whole, **changes)


def result_of(found: Measured, *, repeats: list[Repeat] | None = None) -> RunResult:
    return build_result(
        config=load_config(overrides=["train.batch_size=8", "seed=3"]),
        signature="s" * 12,
        environment={"device": {"name": "Some CPU"}},
        arm="first",
        plan=PLAN,
        train_examples=100,
        measured=found,
        repeats=repeats or [],
    )


def test_quality_before_and_after():
    quality = result_of(measured()).quality
    assert quality.base.loss_nats_per_token == pytest.approx(65 / 40)
    assert quality.tuned.loss_nats_per_token == pytest.approx(48 / 40)
    assert quality.tuned.perplexity == pytest.approx(3.3201169)
    assert (quality.tuned.num_examples, quality.tuned.num_targets) == (2, 40)
    assert (quality.base.bleu, quality.tuned.bleu) == (2.0, 12.5)
    assert quality.tuned.bleu_signature == "nrefs:1|v"
    assert (quality.tuned.chrf, quality.tuned.chrf_signature) == (30.25, "nrefs:1|w")
    assert (quality.tuned.num_answers, quality.tuned.hit_limit_frac) == (4, 0.25)


def test_efficiency():
    cost = result_of(measured()).efficiency
    assert cost.trainable_params == 40
    assert (cost.total_params, cost.full_finetune_params) == (1000, 960)
    assert cost.trainable_frac == 0.04
    # 17 clocked steps, 9 of 0.5 s and 8 of 1.5 s
    assert cost.step_time_s == StepTime(median=0.5, p25=0.5, p75=1.5, num_steps=17)
    assert cost.steps_per_epoch == 12.5
    assert cost.epoch_time_s == pytest.approx(16.5 / 17 * 12.5)
    assert cost.throughput_tokens_per_s == pytest.approx(1700 / 16.5)
    assert cost.latency_ms_per_token == ByAdapterState(base=2.0, unmerged=3.0, merged=None)
    assert cost.latency_first_token_ms == ByAdapterState(base=5.0, unmerged=6.0, merged=None)
    assert cost.peak_memory_gib == PeakMemory(
        kind="resident_set", load=1.0, train=2.5, evaluate=None, generate=None, reserved=None
    )


def test_what_was_not_measured_is_none():
    result = result_of(
        measured(
            base_text=None,
            tuned_text=None,
            step_rows=step_rows(3),
            latency=dict.fromkeys(("base", "unmerged", "merged")),
        )
    )
    for quality in (result.quality.base, result.quality.tuned):
        assert quality.bleu is quality.bleu_signature is quality.chrf is None
        assert quality.num_answers is quality.hit_limit_frac is None
    cost = result.efficiency
    assert cost.step_time_s == StepTime(median=None, p25=None, p75=None, num_steps=0)
    assert cost.epoch_time_s is cost.throughput_tokens_per_s is None
    assert cost.latency_ms_per_token == ByAdapterState(base=None, unmerged=None, merged=None)
    assert result.criteria.convergence.passed is None


def test_who_and_when():
    result = result_of(measured())
    assert result.schema == 1
    assert (result.signature, result.device, result.seed) == ("s" * 12, "Some CPU", 3)
    assert (result.placement, result.arm) == ("all-linear", "first")
    assert result.adapter_sha256 == "ab" * 32
    age = datetime.now(UTC) - datetime.fromisoformat(result.finished_at)
    assert 0 <= age.total_seconds() < 60


def test_an_arm_that_shared_its_steps_is_clocked_by_its_probe():
    probe = [{"clocked": step > 0, "step_time_s": 0.25, "num_tokens": 50} for step in range(5)]
    cost = result_of(measured(probed_rows=probe)).efficiency
    assert cost.measured == "probe of 4 steps, alone"
    assert cost.step_time_s == StepTime(median=0.25, p25=0.25, p75=0.25, num_steps=4)
    assert cost.throughput_tokens_per_s == 200
    assert result_of(measured()).efficiency.measured == "whole run, alone"


def test_a_frozen_trunk_is_stated_with_its_layer_its_size_and_its_time():
    assert result_of(measured()).efficiency.trunk is None
    result = result_of(measured(trunk=TrunkUse(layer=20, kept_gib=0.5)))
    assert result.efficiency.trunk == Trunk(layer=20, kept_gib=0.5, fill_time_s=None)


def test_the_four_criteria_see_this_run():
    few = result_of(measured()).criteria
    assert (few.convergence.passed, few.validation.passed) == (None, None)
    scored = {"base_scores": BASE * 5, "tuned_scores": TUNED * 5}
    criteria = to_json(result_of(measured(**scored)).criteria)
    assert list(criteria) == ["convergence", "validation", "efficiency", "reproducibility"]
    assert [criteria[name]["passed"] for name in criteria] == [True, True, True, None]
    losses = tuple(row["loss_nats_per_token"] for row in step_rows())
    during = {5: [replace(score, nll_sum_nats=1.0) for score in TUNED * 5]}
    assert result_of(measured(**scored, validations=during)).criteria.convergence.passed is False
    same = Repeat("before", "ab" * 32, losses, 48 / 40)
    reproduced = result_of(measured(), repeats=[same]).criteria.reproducibility
    assert reproduced.passed is True
    assert "Bit-identical" in reproduced.evidence


def test_a_run_that_fails_its_audit_is_not_completed():
    assert result_of(measured()).status == "completed"
    broken = measured(audit=replace(AUDIT, frozen_weights_unchanged=False))
    assert result_of(broken).status == "failed"
    assert result_of(broken).audit.faults == ["frozen weights changed"]


def test_it_is_plain_json():
    data = to_json(result_of(measured()))
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def example(row: int) -> Example:
    record = Record(row, f"Do {row}.", "With care." if row == 2 else "", f"Done {row}.")
    return Example(record, (1, 2, 3, 4, 5), 2, False)


EXAMPLES = [example(row) for row in (1, 2, 5, 9)]


def rows(*, scored: int, answered: int) -> list[dict]:
    answers = [Answer(f"Said {index}.", hit_limit=index == 1) for index in range(answered)]
    base_answers = [Answer("", hit_limit=False)] * answered
    return list(
        example_rows(
            EXAMPLES,
            base_scores=[ExampleScore(3, 9.0 + index) for index in range(scored)],
            tuned_scores=[ExampleScore(3, 5.0 + index) for index in range(scored)],
            answers={"base": base_answers, "tuned": answers},
        )
    )


def test_a_row_of_each_example():
    assert rows(scored=2, answered=2)[1] == {
        "row": 2,
        "instruction": "Do 2.",
        "input": "With care.",
        "reference": "Done 2.",
        "tokens": 3,
        "nll_sum_nats": 6.0,
        "base_nll_sum_nats": 10.0,
        "generated": "Said 1.",
        "base_generated": "",
        "hit_limit": True,
        "base_hit_limit": False,
    }


@pytest.mark.parametrize(("scored", "answered", "shown"), [(3, 1, 3), (1, 4, 4), (2, 0, 2)])
def test_examples_scored_or_answered_are_shown_and_the_rest_of_them_null(scored, answered, shown):
    found = rows(scored=scored, answered=answered)
    assert [row["row"] for row in found] == [1, 2, 5, 9][:shown]
    assert [row["nll_sum_nats"] is not None for row in found] == [i < scored for i in range(shown)]
    assert [row["generated"] is not None for row in found] == [i < answered for i in range(shown)]
    assert [row["hit_limit"] is not None for row in found] == [i < answered for i in range(shown)]
