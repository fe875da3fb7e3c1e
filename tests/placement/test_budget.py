"""Budgets: the published ranks at equal parameters, and never more than half a rank step beside."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geometries import LLAMA_2_7B, SMOLLM2_135M, TINY
from loracle.config.run import PlacementConfig
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import (
    PATTERNS,
    PRESETS,
    Inventory,
    LinearModule,
    ModulePlan,
    gap_frac,
    params_per_rank,
    rank_for,
    rank_under,
    resolve_placement,
    select_modules,
)
from placement.budgets import planned_under
from placement.drawn import KINDS, inventories, prove

LLAMA = inventory_from_architecture(LLAMA_2_7B)
SMOLLM2 = inventory_from_architecture(SMOLLM2_135M)
SMALL = inventory_from_architecture(TINY["llama"])


def reference(inventory: Inventory, *, rank: int = 16) -> ModulePlan:
    return resolve_placement("all-linear", inventory=inventory, rank=rank, alpha=2 * rank)


def equal_parameters(placement, inventory: Inventory, *, rank: int = 16) -> ModulePlan:
    return planned_under(
        placement,
        inventory=inventory,
        reference_plan=reference(inventory, rank=rank),
        budget="equal-parameters",
    )


def linear(name: str, in_features: int, out_features: int) -> LinearModule:
    return LinearModule(name, name, 0, in_features, out_features, "attention")


@pytest.mark.parametrize(
    ("inventory", "placement", "rank", "gap"),
    [
        (LLAMA, "all-linear", 16, 0.0),
        (LLAMA, "attention", 38, -0.003279),
        (LLAMA, "attention-qv", 76, -0.003279),
        (LLAMA, "feed-forward", 28, 0.015574),
        (LLAMA, "last-16", 32, 0.0),
        (SMOLLM2, "attention", 42, 42 * 115_200 / 4_884_480 - 1),
        (SMOLLM2, "attention-qv", 85, 85 * 57_600 / 4_884_480 - 1),
        (SMOLLM2, "first-third", 48, 0.0),
    ],
)
def test_the_rank_at_equal_parameters_is_the_published_one(inventory, placement, rank, gap):
    plan = equal_parameters(placement, inventory)
    assert {module.rank for module in plan.modules} == {rank}
    assert {module.alpha for module in plan.modules} == {2.0 * rank}
    found = gap_frac(plan, reference_plan=reference(inventory))
    assert found == pytest.approx(gap, abs=5e-7)


def test_the_gap_is_positive_where_an_arm_has_more():
    few, many = (reference(SMALL, rank=rank) for rank in (4, 5))
    assert gap_frac(many, reference_plan=few) == pytest.approx(0.25)
    assert gap_frac(few, reference_plan=many) == pytest.approx(-0.2)


def test_equal_rank_is_the_references_rank_and_alpha():
    plan = planned_under(
        "attention", inventory=SMALL, reference_plan=reference(SMALL, rank=6), budget="equal-rank"
    )
    assert plan == resolve_placement("attention", inventory=SMALL, rank=6, alpha=12)


@pytest.mark.parametrize(
    ("target", "rank"),
    [(2, 1), (4, 1), (5, 1), (6, 1), (7, 2), (8, 2), (14, 3), (15, 4), (400, 100)],
)
def test_the_nearest_rank_is_taken_and_of_two_the_smaller(target, rank):
    assert rank_for([linear("a", 1, 1), linear("b", 1, 1)], target_params=target) == rank


@pytest.mark.parametrize("target", [1, 0, -5])
def test_a_budget_too_small_for_one_rank_is_refused(target):
    with pytest.raises(PlacementError) as caught:
        rank_for([linear("a", 3, 1)], target_params=target)
    assert str(caught.value).startswith(
        f"a budget of {max(target, 0)} parameters is too small for one rank, which takes 4;"
    )


def test_the_refusal_names_the_placement():
    small = resolve_placement(
        PlacementConfig(modules=["k_proj"], layers=[0]), inventory=SMALL, rank=1, alpha=1
    )
    with pytest.raises(PlacementError, match=r"^placement 'all-linear': a budget of 48 parameters"):
        planned_under(
            "all-linear", inventory=SMALL, reference_plan=small, budget="equal-parameters"
        )


@pytest.mark.parametrize("placement", ["atention", PlacementConfig(modules=["fake"])])
@pytest.mark.parametrize("budget", ["equal-rank", "equal-parameters"])
def test_a_placement_that_does_not_resolve_is_refused_under_every_budget(placement, budget):
    with pytest.raises(PlacementError, match=r"^placement '(atention|fake)': "):
        planned_under(placement, inventory=SMALL, reference_plan=reference(SMALL), budget=budget)


def test_what_a_runs_config_states_gives_the_same_plan():
    placement = PlacementConfig(modules=["*"], ranks={"down_proj": 24})
    whole = reference(SMALL)
    rank, alpha = rank_under(
        placement, inventory=SMALL, reference_plan=whole, budget="equal-parameters"
    )
    plan = resolve_placement(placement, inventory=SMALL, rank=rank, alpha=alpha)
    assert plan == equal_parameters(placement, SMALL)
    assert rank != 16


def test_ranks_given_by_hand_stay_and_the_others_share_what_is_left():
    placement = PlacementConfig(modules=["*"], ranks={"down_proj": 24})
    plan = equal_parameters(placement, SMALL)
    own = [module for module in plan.modules if module.kind == "down_proj"]
    free = [module for module in plan.modules if module.kind != "down_proj"]
    assert {module.rank for module in own} == {24}
    assert len({module.rank for module in free}) == 1
    gap = plan.trainable_params - reference(SMALL).trainable_params
    assert abs(gap) <= params_per_rank(free) / 2
    assert {module.alpha / module.rank for module in plan.modules} == {2.0}


def test_a_placement_that_gives_every_rank_is_left_as_it_is():
    placement = PlacementConfig(modules=["v_proj"], ranks={"v_proj": 5})
    plan = equal_parameters(placement, SMALL)
    assert {(module.rank, module.alpha) for module in plan.modules} == {(5, 10.0)}


def test_ranks_by_hand_that_leave_nothing_are_refused():
    placement = PlacementConfig(modules=["q_proj", "v_proj"], ranks={"v_proj": 1000})
    taken = 1000 * 3 * (32 + 16)
    with pytest.raises(PlacementError) as caught:
        equal_parameters(placement, SMALL)
    message = str(caught.value)
    assert message.startswith("placement 'q_proj+v_proj:v_proj=1000': a budget of 0 parameters")
    assert message.endswith(f"(the ranks it gives itself take {taken:,})")


def test_a_narrow_module_may_get_a_rank_its_update_cannot_have_and_the_plan_says_so():
    plan = equal_parameters("k_proj", SMOLLM2)
    assert {module.rank for module in plan.modules} == {212}  # of 192
    assert plan.overranked == plan.modules
    assert equal_parameters("attention", SMOLLM2).overranked == ()
    just = resolve_placement("k_proj", inventory=SMOLLM2, rank=192, alpha=192)
    assert just.overranked == ()


counted = st.builds("{}-{}".format, st.sampled_from(["first", "last"]), st.integers(1, 9))
placements = st.one_of(st.sampled_from([*PRESETS, *PATTERNS, *KINDS]), counted)


@prove
@given(inventories(), placements, placements, st.integers(1, 64))
def test_an_arm_is_never_more_than_half_a_rank_step_from_the_budget(
    inventory, placement, other, rank
):
    try:
        modules = select_modules(placement, inventory=inventory)
        whole = resolve_placement(other, inventory=inventory, rank=rank, alpha=2.0 * rank)
    except PlacementError:
        return
    step, target = params_per_rank(modules), whole.trainable_params
    try:
        plan = planned_under(
            placement, inventory=inventory, reference_plan=whole, budget="equal-parameters"
        )
    except PlacementError:
        assert 2 * target < step
        return
    assert 2 * abs(plan.trainable_params - target) <= step
    assert plan.trainable_params == step * plan.modules[0].rank
    assert plan.modules[0].alpha == pytest.approx(2 * plan.modules[0].rank)
