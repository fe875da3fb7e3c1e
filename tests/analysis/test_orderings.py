"""Published orderings: reproduced, contradicted, not distinguishable or not tested."""

from dataclasses import replace

import pytest

from analysis.stats.simulated import ARMS, SimulatedArm, simulated_study
from loracle.analysis.orderings import published_orderings
from loracle.analysis.rate_search import shared_rate
from loracle.analysis.verdicts import judge


def test_orderings_are_told_by_direct_comparison(tmp_path):
    study = simulated_study(tmp_path, num_examples=150)
    verdicts = judge(study)
    found = {ordering.id: ordering for ordering in published_orderings(study, verdicts)}
    assert list(found) == ["O1", "O2", "O3", "O4", "O5", "O6"]
    first = found["O1"]
    assert first.outcome == "reproduced"
    assert [(c.arm, c.reference) for c in first.comparisons] == [("feed-forward", "attention")]
    assert first.comparisons[0].num_comparisons == 1
    assert first.comparisons[0].difference == verdicts.pair("feed-forward", "attention").difference
    assert "feed-forward: Loss" in first.evidence
    assert found["O2"].outcome == "reproduced"
    assert found["O5"].outcome == "reproduced"
    assert "feed-forward 4.39 GiB, attention-qv 3.91 GiB (+12.4%)" in found["O5"].evidence
    assert {found[key].outcome for key in ("O3", "O4", "O6")} == {"not tested"}
    assert all("arXiv" in o.source or "PEFT" in o.source for o in found.values())


def outcomes_of(folder, *arms: SimulatedArm, **options) -> dict[str, str]:
    record = simulated_study(folder, arms=arms, num_examples=150, **options)
    return {o.id: o.outcome for o in published_orderings(record, judge(record))}


def with_effects(**effects: float) -> list[SimulatedArm]:
    named = {arm.name: arm for arm in ARMS}
    return [
        replace(named[name.replace("_", "-")], effect_nats=effect)
        for name, effect in effects.items()
    ]


def test_the_opposite_ordering_is_a_contradiction(tmp_path):
    arms = with_effects(all_linear=0.0, attention_qv=-0.05, attention=0.0, feed_forward=0.05)
    found = outcomes_of(tmp_path, *arms)
    assert (found["O1"], found["O2"]) == ("contradicted", "contradicted")


def test_no_ordering_is_neither(tmp_path):
    arms = with_effects(attention=0.0, feed_forward=0.0)
    found = outcomes_of(tmp_path, *arms, seeds=(0, 1))
    assert (found["O1"], found["O2"]) == ("not distinguishable", "not tested")


def test_single_projections_are_compared_with_each_other(tmp_path):
    effects = {"q_proj": 0.08, "k_proj": 0.09, "v_proj": 0.01, "o_proj": 0.0}
    arms = [SimulatedArm(kind, effect, kinds=(kind,)) for kind, effect in effects.items()]
    assert outcomes_of(tmp_path / "as-published", *arms)["O3"] == "reproduced"
    other = [replace(arm, effect_nats=-arm.effect_nats) for arm in arms]
    assert outcomes_of(tmp_path / "opposite", *other)["O3"] == "contradicted"


def test_rank_is_told_by_arms_that_differ_in_nothing_else(tmp_path):
    low = SimulatedArm("low", 0.05, rank=4)
    arms = (SimulatedArm("reference"), low, SimulatedArm("high", 0.0, rank=32))
    assert outcomes_of(tmp_path, *arms)["O4"] == "reproduced"


def test_unequal_budgets_do_not_test_an_ordering_at_equal_parameters(tmp_path):
    attention, feed_forward = with_effects(attention=0.0, feed_forward=0.05)
    found = outcomes_of(tmp_path, attention, replace(feed_forward, rank=4))
    assert (found["O1"], found["O5"]) == ("not tested", "not tested")


@pytest.mark.parametrize(
    ("gib", "outcome"), [(4.1, "contradicted"), (4.6, "not distinguishable"), (None, "not tested")]
)
def test_memory_is_told_by_more_than_the_spread_of_runs(tmp_path, gib, outcome):
    qv, feed_forward = with_effects(attention_qv=0.0, feed_forward=0.0)
    arms = replace(qv, peak_memory_gib=4.61), replace(feed_forward, peak_memory_gib=gib)
    assert outcomes_of(tmp_path, *arms)["O5"] == outcome


def test_an_ordering_without_a_completed_run_is_not_tested(tmp_path):
    arms = with_effects(attention=0.0, feed_forward=0.0)
    missing = [("feed-forward", seed) for seed in (0, 1, 2)]
    assert outcomes_of(tmp_path, *arms, unfinished=missing)["O1"] == "not tested"


def test_orderings_found_at_searched_rates_are_not_tested_at_one_rate(tmp_path):
    study = simulated_study(tmp_path, num_examples=150, searched=False)
    found = {o.id: o for o in published_orderings(study, judge(study))}
    assert {found[key].outcome for key in ("O1", "O2")} == {"not tested"}
    assert [c.arm for c in found["O1"].comparisons] == ["feed-forward"]
    assert (
        "all arms with adapters ran at 0.0003. At that rate: feed-forward: Loss"
        in found["O1"].evidence
    )
    assert found["O5"].outcome == "reproduced"


def test_a_shared_rate_counts_ranks_of_modules_and_arms_that_ran(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:2], num_answers=0, searched=False)
    rate = shared_rate(study)
    assert rate is not None
    assert (rate.learning_rate, rate.lowest_rank) == (3e-4, 16)
    first, second = study.arms
    mixed = [dict(module, rank=16) for module in second.modules]
    assert shared_rate(replace(study, arms=(first, replace(second, modules=tuple(mixed))))) is None
    mixed[0]["rank"] = 32
    assert shared_rate(replace(study, arms=(first, replace(second, modules=tuple(mixed)))))
    ran = tuple(run for run in study.runs if run.arm == first.name)
    assert shared_rate(replace(study, runs=ran)) is None
