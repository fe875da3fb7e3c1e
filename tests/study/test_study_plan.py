"""From a study's file to explicit arms and runs with ids of their own."""

from dataclasses import replace

import pytest

from geometries import SMOLLM2_135M
from loracle.config.files import load_config
from loracle.config.run import config_digest, difference
from loracle.errors import PlacementError, UsageError
from loracle.model.inventory import inventory_from_architecture
from loracle.study.file import parse_study
from loracle.study.plan import plan_study
from loracle.study.search import search_runs, with_learning_rates

INVENTORY = inventory_from_architecture(SMOLLM2_135M)
BASE = load_config("demo")
SCORES = {
    "gradient-energy": {
        module.name: float(index)
        for index, module in enumerate(INVENTORY.modules)
        if module.role != "head"
    }
}


def planned(arms, *, scores=SCORES, base=BASE, **given):
    tree = {
        "question": "Does it matter?",
        "reference": "all-linear",
        "budget": "equal-parameters",
        "seeds": [0, 1],
        "arms": arms,
    }
    study = parse_study(tree | given, origin="test")
    return plan_study(study, base=base, name="test", inventory=INVENTORY, scores=scores)


TWO = {"all-linear": None, "attention": None}


def test_seeds_are_outermost_so_that_a_study_cut_short_is_balanced():
    plan = planned(TWO)
    assert [(run.seed, run.arm) for run in plan.runs] == [
        (0, "all-linear"),
        (0, "attention"),
        (1, "all-linear"),
        (1, "attention"),
    ]


def test_an_id_is_arm_seed_and_what_the_run_computes():
    runs = planned(TWO).runs
    for run in runs:
        assert run.id == f"{run.arm}-s{run.seed}-{config_digest(run.config)[:8]}"
    again = planned(TWO | {"feed-forward": None}, seeds=[0, 1, 2]).runs
    assert {run.id for run in runs} < {run.id for run in again}
    longer = BASE.model_copy(update={"train": BASE.train.model_copy(update={"max_steps": 61})})
    assert {run.id for run in planned(TWO, base=longer).runs}.isdisjoint(run.id for run in runs)


def test_runs_differ_in_placement_rank_alpha_and_seed_only():
    plan = planned(
        TWO | {"best": {"placement": {"strategic": "gradient-energy", "keep_frac": 0.3}}}
    )
    for run in plan.runs:
        keys = {line.partition(":")[0] for line in difference(BASE, run.config)}
        assert keys <= {
            "lora.placement",
            "lora.placement.modules",
            "lora.placement.layers",
            "lora.rank",
            "lora.alpha",
            "seed",
        }
        assert run.config.lora.alpha / run.config.lora.rank == BASE.lora.alpha / BASE.lora.rank


def test_equal_parameters_chooses_the_rank_and_shows_the_gap():
    plan = planned(TWO | {"last-third": None})
    reference, *others = plan.arms
    assert (reference.rank, reference.budget_gap_frac) == (BASE.lora.rank, 0.0)
    for arm in others:
        spent, allowed = arm.plan.trainable_params, reference.plan.trainable_params
        assert arm.budget_gap_frac == pytest.approx(spent / allowed - 1)
        step = spent / arm.rank
        assert abs(spent - allowed) <= step / 2
        assert all(module.alpha / module.rank == 2.0 for module in arm.plan.modules)


def test_equal_rank_keeps_the_rank_and_has_no_gap():
    plan = planned(TWO, budget="equal-rank")
    assert [(arm.rank, arm.budget_gap_frac) for arm in plan.arms] == [(16, None), (16, None)]


def test_a_rank_given_by_hand_stays_and_its_gap_is_shown():
    plan = planned(TWO | {"narrow": {"placement": "attention", "rank": 1}})
    narrow = plan.arms[-1]
    assert (narrow.rank, narrow.alpha) == (1, 2.0)
    assert narrow.budget_gap_frac < -0.5


def test_a_strategic_arm_is_an_explicit_list_of_the_best():
    plan = planned(
        TWO | {"best": {"placement": {"strategic": "gradient-energy", "keep_frac": 0.2}}}
    )
    best = plan.arms[-1]
    ranking = sorted(SCORES["gradient-energy"], key=SCORES["gradient-energy"].__getitem__)
    count = len(best.plan.modules)
    assert {module.name for module in best.plan.modules} == set(ranking[-count:])
    assert best.placement.modules == [module.name for module in best.plan.modules]


def test_a_random_arm_is_the_draw_of_its_own_seed():
    def arms(*draws):
        named = {
            f"luck {k}": {"placement": {"random": draw, "keep_frac": 0.3}}
            for k, draw in enumerate(draws)
        }
        return planned(TWO | named).arms[2:]

    one, two = arms(0, 1)
    (again,) = arms(0)
    assert one.plan == again.plan
    assert one.plan.modules != two.plan.modules
    assert len(one.plan.modules) == len(two.plan.modules)


def test_two_arms_that_come_to_the_same_are_refused():
    with pytest.raises(PlacementError, match="arms 'all-linear' and 'everything' are the same"):
        planned(TWO | {"everything": {"placement": {"modules": ["*"]}}})


def test_an_arm_that_matches_nothing_is_named():
    with pytest.raises(PlacementError, match=r"arm 'typo': .*did you mean 'attention'"):
        planned(TWO | {"typo": {"placement": "atention"}})


def test_a_budget_too_small_for_one_rank_is_named():
    arms = {"small": {"placement": {"modules": ["k_proj"], "layers": [0]}, "rank": 1}}
    with pytest.raises(PlacementError, match=r"arm 'all-linear': .*too small for one rank"):
        planned(arms | {"all-linear": None}, reference="small")


def test_full_fine_tuning_has_its_own_rate_no_budget_and_no_search():
    plan = planned(
        TWO | {"full": None},
        full={"learning_rate": 3e-5},
        search={"learning_rates": [1e-4, 1e-3], "seed": 9},
    )
    full = plan.arms[-1]
    assert (full.plan.trainable_params, full.budget_gap_frac) == (134_515_008, None)
    assert (full.to_json()["rank"], full.to_json()["alpha"]) == (None, None)
    rates = {run.arm: run.config.train.learning_rate for run in plan.runs}
    assert rates == {"all-linear": 3e-4, "attention": 3e-4, "full": 3e-5}
    assert {run.arm for run in search_runs(plan)} == set(TWO)
    found = with_learning_rates(plan, {"all-linear": 0.1, "attention": 0.2})
    assert {run.arm: run.config.train.learning_rate for run in found.runs}["full"] == 3e-5


def test_noise_runs_are_the_references_and_come_last():
    plan = planned(TWO, noise={"repeats": 2, "extra_seeds": [7]})
    first = plan.runs[0]
    *_, one, two, extra = plan.runs
    assert [one.role, two.role, extra.role] == ["repeat", "repeat", "extra-seed"]
    assert [one.id, two.id] == [f"{first.id}-repeat1", f"{first.id}-repeat2"]
    assert one.config == two.config == first.config
    assert (extra.arm, extra.seed) == ("all-linear", 7)


def test_a_search_tries_every_rate_on_every_arm_with_a_seed_of_its_own():
    plan = planned(TWO, search={"learning_rates": [0.1, 0.2], "seed": 9})
    trials = search_runs(plan)
    assert [(run.arm, run.seed, run.config.train.learning_rate) for run in trials] == [
        ("all-linear", 9, 0.1),
        ("all-linear", 9, 0.2),
        ("attention", 9, 0.1),
        ("attention", 9, 0.2),
    ]
    assert {run.role for run in trials} == {"search"}
    assert search_runs(planned(TWO)) == []


def test_each_arm_gets_the_rate_that_was_found_for_it():
    plan = planned(TWO, search={"learning_rates": [0.1, 0.2], "seed": 9}, noise={"repeats": 1})
    found = with_learning_rates(plan, {"all-linear": 0.1, "attention": 0.2})
    rates = {(run.arm, run.config.train.learning_rate) for run in found.runs}
    assert rates == {("all-linear", 0.1), ("attention", 0.2)}
    assert [run.role for run in found.runs] == [run.role for run in plan.runs]
    assert found.runs[-1].id == f"{found.runs[0].id}-repeat1"
    assert found.runs[0].id != plan.runs[0].id
    with pytest.raises(UsageError, match="no learning rate of arm 'attention'"):
        with_learning_rates(plan, {"all-linear": 0.1})


def test_the_plan_is_plain_data_that_reads_back(tmp_path):
    from loracle.records.study_folder import ArmRecord
    from loracle.study.run import keep_plan

    plan = planned(TWO)
    keep_plan(plan, out=tmp_path / "study")
    arms = plan.plan_json()["arms"]
    assert ArmRecord(**arms[1] | {"modules": tuple(arms[1]["modules"])}).name == "attention"
    assert plan.study_json()["config"] == BASE.model_dump(mode="json")
    assert replace(plan, runs=()).plan_json()["runs"] == []
