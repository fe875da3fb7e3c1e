"""The Pareto set and the recommendation claim no more than was established."""

import statistics
from dataclasses import replace

import pytest

from analysis.stats.simulated import ARMS, SimulatedArm, simulated_study
from loracle.analysis.costs import (
    AXES,
    Axis,
    Cost,
    amount_words,
    arm_costs,
    costs_more,
    costs_no_more,
    ratio_range,
)
from loracle.analysis.recommendation import recommend
from loracle.analysis.tradeoffs import pareto
from loracle.analysis.verdicts import judge

# Cheap and bad, dear and good, as good and dear, dear and bad.
CHEAP = SimulatedArm("cheap", 0.1, step_time_s=1.0, peak_memory_gib=2.0, latency_ms=40.0)
GOOD = SimulatedArm("good", 0.0, step_time_s=3.0, peak_memory_gib=6.0, latency_ms=60.0)
ALIKE = SimulatedArm("alike", 0.0, step_time_s=2.0, peak_memory_gib=5.0, latency_ms=50.0)
BAD = SimulatedArm("bad", 0.1, step_time_s=4.0, peak_memory_gib=8.0, latency_ms=70.0)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    arms = (GOOD, CHEAP, ALIKE, BAD)
    return simulated_study(tmp_path_factory.mktemp("study"), arms=arms, num_examples=100)


@pytest.fixture(scope="module")
def verdicts(study):
    return judge(study)


def cost(*values: float, axis: Axis = "step_time_s", paired_by: str = "seed") -> Cost:
    middle = statistics.median(values)
    return Cost(axis, middle, min(values), max(values), dict(enumerate(values)), paired_by)


def test_costs_are_compared_seed_by_seed():
    # Batches differ between seeds by more than arms do, and are the same for all arms of a seed.
    dear, cheap = cost(2.0, 4.0, 6.0), cost(1.5, 3.0, 4.5)
    assert ratio_range(dear, cheap) == pytest.approx((4 / 3, 4 / 3))
    assert costs_more(dear, cheap)
    assert costs_no_more(cheap, dear)
    assert not costs_no_more(dear, cheap)
    assert not costs_more(cheap, dear)


def test_a_cost_that_was_higher_in_one_seed_only_is_not_established():
    ours, theirs = cost(3.0, 3.0, 9.0), cost(4.0, 4.0, 4.0)
    for one, other in ((ours, theirs), (theirs, ours)):
        assert not costs_more(one, other)
        assert not costs_no_more(one, other)


def test_one_slow_round_of_many_establishes_nothing():
    ours = cost(*[3.0] * 7, 30.0, paired_by="round")
    theirs = cost(*[4.0] * 8, paired_by="round")
    assert costs_no_more(ours, theirs)
    assert costs_more(theirs, ours)


def test_costs_that_share_no_condition_are_not_compared():
    by_seed, by_round = cost(1.0, 1.0), cost(9.0, 9.0, paired_by="round")
    assert ratio_range(by_seed, by_round) is None
    assert not costs_more(by_round, by_seed)
    assert not costs_no_more(by_seed, by_round)


def test_a_measured_cost_is_resolved_to_one_percent_and_a_counted_one_exactly():
    assert costs_no_more(cost(3.02), cost(3.0))
    assert not costs_more(cost(3.02), cost(3.0))
    assert costs_more(cost(1001, axis="trainable_params"), cost(1000, axis="trainable_params"))


def test_a_cost_is_the_median_over_the_runs_with_their_range(study):
    found = arm_costs(study, "good")
    times = {
        seed: run.result.efficiency.step_time_s.median
        for seed, run in study.runs_of("good").items()
    }
    each = times.values()
    assert found["step_time_s"] == Cost(
        "step_time_s", sorted(each)[1], min(each), max(each), values=times
    )
    assert len(found["step_time_s"].values) == 3
    assert list(found) == list(AXES)
    assert found["adapter_mib"].median == found["trainable_params"].median * 4 / 2**20


def test_an_adapter_that_was_kept_has_the_size_of_its_file(tmp_path):
    record = simulated_study(tmp_path, arms=ARMS[:2], repeats=0, extra_seeds=())
    for run in record.runs_of("attention").values():
        (run.path / "adapter").mkdir()
        (run.path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 2**19)
    assert arm_costs(record, "attention")["adapter_mib"].median == 0.5


def test_what_was_not_measured_has_no_cost(tmp_path):
    unclocked = replace(GOOD, step_time_s=None)
    record = simulated_study(tmp_path, arms=(unclocked, CHEAP), repeats=0, extra_seeds=())
    found = judge(record)
    assert "step_time_s" not in arm_costs(record, "good")
    assert [place.arm for place in pareto(record, found, "step_time_s")] == ["cheap"]
    assert recommend(record, found, max_step_time_s=9.0).arm == "cheap"
    # Memory alone tells them apart where time was not measured of all.
    assert recommend(record, found).arm == "good"


def test_amounts_are_told_with_their_unit():
    assert amount_words("trainable_params", 4_884_480) == "4,884,480 trainable parameters"
    assert amount_words("peak_memory_gib", 4.7319) == "4.73 GiB"
    assert amount_words("latency_ms_per_token", 1234.5) == "1,234 ms per token"


def test_an_arm_is_dominated_only_by_an_established_difference(study, verdicts):
    found = {place.arm: place for place in pareto(study, verdicts, "step_time_s")}
    assert {arm: place.state for arm, place in found.items()} == {
        "good": "undecided",
        "cheap": "efficient",
        "alike": "efficient",
        "bad": "dominated",
    }
    assert found["good"].rivals == ("alike",)
    assert set(found["bad"].rivals) == {"good", "alike"}
    assert found["cheap"].rivals == ()


def test_places_carry_the_loss_with_its_interval_and_a_sentence(study, verdicts):
    found = {place.arm: place for place in pareto(study, verdicts, "peak_memory_gib")}
    assert found["good"].comparison is None
    assert found["bad"].comparison == verdicts.comparison("bad")
    assert found["bad"].loss_nats_per_token == verdicts.summary("bad").loss_nats_per_token.mean
    assert found["cheap"].reason.endswith("GiB: every other arm costs more.")
    assert found["alike"].reason.endswith("GiB: every arm that may cost no more has a higher loss.")
    assert found["good"].reason.endswith("GiB: alike may cost no more, and may have as low a loss.")
    assert found["bad"].reason.endswith("costs no more and has a lower loss.")


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_places_every_arm(study, verdicts, axis):
    found = pareto(study, verdicts, axis)
    assert [place.arm for place in found] == ["good", "cheap", "alike", "bad"]
    assert {place.cost.axis for place in found} == {axis}


def test_at_the_same_cost_the_better_arm_dominates_and_like_arms_are_undecided(study, verdicts):
    found = {place.arm: place.state for place in pareto(study, verdicts, "trainable_params")}
    assert found == {
        "good": "undecided", "alike": "undecided", "cheap": "dominated", "bad": "dominated",
    }  # fmt: skip


def mean_loss(verdicts, arm: str) -> float:
    return verdicts.summary(arm).loss_nats_per_token.mean


def test_of_the_arms_that_cannot_be_told_from_the_best_the_cheapest_is_taken(study, verdicts):
    found = recommend(study, verdicts)
    assert found.arm == "alike"
    first, other = sorted(("good", "alike"), key=lambda arm: mean_loss(verdicts, arm))
    assert found.words.startswith(f"{first} has the lowest mean loss (")
    assert f"; {other} cannot be told apart from it and " in found.words
    assert found.words.endswith("take alike.")


def test_advice_never_contradicts_a_verdict_against_the_reference(tmp_path):
    """Holm over all pairs is stricter than Holm over the arms; either establishes a difference."""
    study = simulated_study(
        tmp_path, arms=(GOOD, replace(ALIKE, effect_nats=0.008), BAD), num_examples=100
    )
    verdicts = judge(study)
    (pair,) = [pair for pair in verdicts.pairs if {pair.arm, pair.reference} == {"good", "alike"}]
    assert pair.verdict == "not distinguishable"
    changed = tuple(
        replace(each, verdict="worse")
        if (each.arm, each.metric) == ("alike", "loss_nats_per_token")
        else each
        for each in verdicts.comparisons
    )
    told = replace(verdicts, comparisons=changed)
    assert not verdicts.is_worse("alike", "good")
    assert told.is_worse("alike", "good")
    assert not told.is_worse("good", "alike")
    assert recommend(study, told).arm == "good"
    places = {place.arm: place for place in pareto(study, told, "trainable_params")}
    assert "good" in places["alike"].rivals


def test_a_constraint_leaves_out_what_does_not_fit(study, verdicts):
    found = recommend(study, verdicts, max_memory_gib=3)
    assert found.arm == "cheap"
    assert found.words.startswith("Within 3 GiB: only cheap fits (")


def test_a_constraint_holds_for_the_dearest_run(study, verdicts):
    highest = arm_costs(study, "alike")["peak_memory_gib"].high
    assert recommend(study, verdicts, max_memory_gib=highest).arm == "alike"
    assert recommend(study, verdicts, max_memory_gib=highest - 1e-9).arm == "cheap"


def test_nothing_is_recommended_if_nothing_fits(study, verdicts):
    found = recommend(study, verdicts, max_memory_gib=0.25, max_step_time_s=0.5)
    assert found.arm is None
    assert found.words == "Within 0.25 GiB and 0.5 s per step: no arm was measured to fit."


def told(folder, *arms: SimulatedArm, **limits: float) -> str:
    record = simulated_study(folder, arms=arms, num_examples=100, repeats=0, extra_seeds=())
    return recommend(record, judge(record), **limits).words


def test_the_words_say_what_the_cheaper_arm_saves(tmp_path):
    words = told(tmp_path, GOOD, replace(ALIKE, effect_nats=0.008), BAD, max_memory_gib=10)
    assert words.startswith("Within 10 GiB: good has the lowest mean loss (")
    assert "; alike cannot be told apart from it and costs least (" in words
    assert words.endswith("GiB): take alike.")


def test_the_words_say_that_the_best_is_established(tmp_path):
    words = told(tmp_path, GOOD, CHEAP)
    assert words.startswith("good has the lowest mean loss (")
    assert words.endswith(", and every other arm is established to be worse: take good.")


def test_the_words_say_that_what_is_alike_costs_no_less(tmp_path):
    arms = (replace(GOOD, effect_nats=0.004), replace(ALIKE, name="low"))
    words = told(tmp_path, *arms)
    assert words.endswith(
        "; good cannot be told apart from it and is not established to cost less memory, time or "
        "parameters: take low."
    )


def test_without_intervals_no_arm_is_dominated_and_the_cheapest_is_taken(tmp_path):
    record = simulated_study(tmp_path, arms=(GOOD, CHEAP, BAD), seeds=(0,), repeats=0)
    found = judge(record)
    assert "dominated" not in {place.state for place in pareto(record, found, "step_time_s")}
    assert recommend(record, found).arm == "cheap"


def test_an_arm_without_a_completed_run_is_left_out(tmp_path):
    missing = [("cheap", seed) for seed in (0, 1, 2)]
    record = simulated_study(tmp_path, arms=(GOOD, CHEAP), unfinished=missing)
    found = judge(record)
    assert [place.arm for place in pareto(record, found, "step_time_s")] == ["good"]
    assert recommend(record, found).arm == "good"
