"""Random placements: every set equally likely, the same size as the set they are the control of."""

import math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from geometries import TINY
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import Inventory, random_share
from placement.drawn import inventories, prove

SMALL = inventory_from_architecture(TINY["llama"])
NAMES = [module.name for module in SMALL.modules if module.role != "head"]


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
    for seed in range(20):
        names = random_share(SMALL, keep_frac=0.4, seed=seed)
        assert list(names) == [name for name in NAMES if name in names]


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
