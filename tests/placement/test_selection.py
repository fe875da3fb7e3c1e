"""Strategic placements: the best modules and no others, whichever way the size is given."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geometries import TINY
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import (
    SCORES,
    gap_frac,
    named_placement,
    resolve_placement,
    select_modules,
    select_modules_by_score,
)
from placement.budgets import planned_under
from placement.drawn import inventories, prove

SMALL = inventory_from_architecture(TINY["llama"])
NAMES = [module.name for module in SMALL.modules if module.role != "head"]
FLAT = dict.fromkeys(NAMES, 1.0)


def test_the_best_are_taken_and_stand_in_the_models_order():
    last, middle = "model.layers.2.mlp.down_proj", "model.layers.1.self_attn.k_proj"
    chosen = select_modules_by_score(
        FLAT | {last: 9.0, middle: 5.0}, inventory=SMALL, keep_frac=2 / 21
    )
    assert chosen == (middle, last)


def test_of_equal_scores_the_earlier_module_is_taken():
    backwards = dict(reversed(FLAT.items()))
    chosen = select_modules_by_score(backwards, inventory=SMALL, keep_frac=0.25)
    assert chosen == tuple(NAMES[:5])


def test_negative_scores_are_scores():
    scores = {name: -float(place) for place, name in enumerate(NAMES)}
    assert select_modules_by_score(scores, inventory=SMALL, keep_frac=0.1) == tuple(NAMES[:2])


@pytest.mark.parametrize(
    ("keep_frac", "count"), [(0.001, 1), (0.25, 5), (0.26, 5), (0.5, 11), (0.99, 21), (1.0, 21)]
)
def test_a_fraction_is_the_nearest_number_of_modules(keep_frac, count):
    assert len(select_modules_by_score(FLAT, inventory=SMALL, keep_frac=keep_frac)) == count


@pytest.mark.parametrize("keep_frac", [0.0, -0.5, 1.01, math.nan])
def test_a_fraction_out_of_range_is_refused(keep_frac):
    with pytest.raises(PlacementError, match=r"^keep_frac \S+: must be above 0 and at most 1$"):
        select_modules_by_score(FLAT, inventory=SMALL, keep_frac=keep_frac)


def test_modules_without_a_score_are_no_candidates():
    some = {name: 1.0 for name in NAMES if "q_proj" in name}
    assert select_modules_by_score(some, inventory=SMALL, keep_frac=1.0) == tuple(some)


@pytest.mark.parametrize(
    ("scores", "part"),
    [
        ({}, "scores: no module has one"),
        ({"model.layers.9.mlp.up_proj": 1.0}, "'model.layers.9.mlp.up_proj' is no linear layer"),
        ({"model.layers.0.mlp.up_prj": 1.0}, "did you mean 'model.layers.0.mlp.up_proj'?"),
        ({NAMES[0]: math.nan}, f"'{NAMES[0]}' has nan, which cannot be compared"),
        ({NAMES[0]: math.inf}, "has inf"),
    ],
)
def test_scores_of_something_else_are_refused(scores, part):
    with pytest.raises(PlacementError) as caught:
        select_modules_by_score(scores, inventory=SMALL, keep_frac=0.5)
    assert part in str(caught.value)


@prove
@given(inventories(), st.data(), st.floats(0.01, 1))
def test_no_module_is_taken_before_a_better_one(inventory, data, share):
    levels = st.integers(-3, 3).map(float)
    scores = {module.name: data.draw(levels) for module in inventory.modules}
    names = select_modules_by_score(scores, inventory=inventory, keep_frac=share)
    left = [scores[m.name] for m in inventory.modules if m.name not in names]
    assert min(scores[name] for name in names) >= max(left, default=-math.inf)


def test_the_chosen_names_are_a_placement_that_needs_no_scores():
    scores = {name: float(len(name)) for name in NAMES}
    chosen = select_modules_by_score(scores, inventory=SMALL, keep_frac=0.3)
    modules = select_modules(named_placement(chosen), inventory=SMALL)
    assert tuple(module.name for module in modules) == chosen


def test_the_rank_then_meets_the_budget():
    whole = resolve_placement("all-linear", inventory=SMALL, rank=16, alpha=32)
    chosen = select_modules_by_score(FLAT, inventory=SMALL, keep_frac=0.25)
    plan = planned_under(
        named_placement(chosen), inventory=SMALL, reference_plan=whole, budget="equal-parameters"
    )
    assert abs(gap_frac(plan, reference_plan=whole)) < 0.01
    assert plan.modules[0].rank == 73  # 22,272 parameters over 304 per rank


def test_every_score_has_a_meaning_in_one_line():
    assert {"gradient-energy", "feature-norm"} <= SCORES.keys()
    assert all(meaning and "\n" not in meaning for meaning in SCORES.values())
