"""Random placements: every set equally likely, the same size as the set they are the control of."""

import math
from collections import Counter
from itertools import combinations

import pytest
from drawn import inventories, prove
from hypothesis import assume, given
from hypothesis import strategies as st

from geometries import SMOLLM2_135M, TINY
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import (
    Inventory,
    fit,
    gap_frac,
    named_placement,
    params_per_rank,
    random_modules,
    random_share,
    resolve_placement,
    select_modules,
)

SMALL = inventory_from_architecture(TINY["llama"])
SMOLLM2 = inventory_from_architecture(SMOLLM2_135M)
NAMES = [module.name for module in SMALL.modules if module.role != "head"]


def size_of(names: tuple[str, ...], inventory: Inventory) -> int:
    return params_per_rank(module for module in inventory.modules if module.name in names)


def test_a_seed_is_a_draw_and_stays_the_same_draw():
    """A change here would silently make every recorded random arm another arm."""
    assert random_share(SMALL, keep_frac=0.2, seed=0) == (
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    )
    draws = {random_share(SMALL, keep_frac=0.3, seed=seed) for seed in range(40)}
    assert len(draws) == 40


def test_a_share_has_the_number_of_modules_that_a_strategic_one_has():
    for keep_frac, count in ((0.001, 1), (0.25, 5), (0.5, 11), (1.0, 21)):
        assert len(random_share(SMALL, keep_frac=keep_frac, seed=3)) == count
    with pytest.raises(PlacementError, match=r"^keep_frac 1\.5: must be above 0"):
        random_share(SMALL, keep_frac=1.5, seed=3)


def test_every_module_and_every_pair_is_equally_likely():
    draws = 2000
    singles: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for seed in range(draws):
        names = random_share(SMALL, keep_frac=1 / 3, seed=seed)
        singles.update(names)
        pairs.update(combinations(names, 2))
    assert set(singles) == set(NAMES)
    for counts, among, share in ((singles, 21, 7 / 21), (pairs, 210, 7 * 6 / (21 * 20))):
        assert len(counts) == among
        deviation = math.sqrt(draws * share * (1 - share))
        assert max(abs(count - draws * share) for count in counts.values()) < 5 * deviation


def test_what_is_drawn_is_in_the_models_order_and_without_the_head():
    modules = select_modules("attention", inventory=SMALL)
    for seed in range(20):
        for names in (
            random_modules(SMALL, like=modules, seed=seed),
            random_share(SMALL, keep_frac=0.4, seed=seed),
        ):
            assert list(names) == [name for name in NAMES if name in names]


def test_the_size_may_be_given_as_parameters_at_rank_1():
    modules = select_modules("attention-qv", inventory=SMALL)
    by_number = random_modules(SMALL, like=params_per_rank(modules), seed=1)
    assert random_modules(SMALL, like=modules, seed=1) == by_number


def test_as_large_as_everything_is_everything():
    everything = select_modules("all-linear", inventory=SMALL)
    assert list(random_modules(SMALL, like=everything, seed=0)) == NAMES


@pytest.mark.parametrize("placement", ["attention", "feed-forward", "attention-qv", "last-third"])
def test_the_control_has_the_parameters_of_what_it_controls(placement):
    like = resolve_placement(placement, inventory=SMOLLM2, rank=16, alpha=32)
    modules = select_modules(placement, inventory=SMOLLM2)
    for seed in range(5):
        drawn = named_placement(random_modules(SMOLLM2, like=modules, seed=seed))
        plan = resolve_placement(drawn, inventory=SMOLLM2, rank=16, alpha=32)
        assert abs(gap_frac(plan, reference_plan=like)) < 0.01
        fitted = fit(drawn, inventory=SMOLLM2, reference_plan=like, budget="equal-parameters")
        assert {module.rank for module in fitted.modules} == {16}


@prove
@given(inventories(), st.data(), st.integers(0, 99))
def test_the_gap_is_at_most_half_a_module(inventory, data, seed):
    candidates = select_modules("all-linear", inventory=inventory)
    like = data.draw(st.lists(st.sampled_from(candidates), min_size=1, unique=True))
    names = random_modules(inventory, like=like, seed=seed)
    gap = size_of(names, inventory) - params_per_rank(like)
    taken = [params_per_rank([m]) for m in candidates if m.name in names]
    left = [params_per_rank([m]) for m in candidates if m.name not in names]
    if gap > 0:
        assert 2 * gap < max(taken)
    if gap < 0:
        assert 2 * -gap <= min(left)


@pytest.mark.parametrize("size", [1, 24])
def test_too_little_for_one_module_is_refused(size):
    with pytest.raises(PlacementError, match=f"{size} parameters at rank 1 are too few for one"):
        random_modules(SMALL, like=size, seed=0)
    assert len(random_modules(SMALL, like=25, seed=0)) == 1  # the smallest has 48


def test_more_than_everything_is_refused():
    with pytest.raises(PlacementError, match=r"1,393 .* more than all 21 modules have \(1,392\)"):
        random_modules(SMALL, like=1393, seed=0)


@prove
@given(inventories(), st.integers(0, 99), st.floats(0.1, 1))
def test_a_module_keeps_its_place_in_the_draw_whatever_else_there_is(inventory, seed, share):
    assume(len(inventory.modules) > 2)
    without = Inventory(inventory.modules[1:], inventory.num_layers, inventory.total_params)
    names = set(random_share(inventory, keep_frac=share, seed=seed))
    fewer = set(random_share(without, keep_frac=share, seed=seed))
    # One order is the other without one module, so of two draws one holds the other.
    names.discard(inventory.modules[0].name)
    assert names <= fewer or fewer <= names
