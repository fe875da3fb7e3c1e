"""A saved plan that contradicts itself is refused."""

import json

import pytest

from geometries import TINY
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import ModulePlan, resolve_placement


@pytest.fixture
def saved() -> dict:
    inventory = inventory_from_architecture(TINY["gpt2"])
    plan = resolve_placement("attention", inventory=inventory, rank=4, alpha=8)
    return json.loads(json.dumps(plan.to_json()))


def test_the_saved_counts_are_the_closed_form(saved):
    assert saved["trainable_params"] == 3 * 4 * ((32 + 96) + (32 + 32))
    assert sum(entry["trainable_params"] for entry in saved["modules"]) == saved["trainable_params"]


def test_counts_that_do_not_follow_from_the_ranks_are_refused(saved):
    saved["modules"][0]["rank"] += 1
    with pytest.raises(PlacementError, match=r"trainable_params is 2304, but .* give 2432"):
        ModulePlan.from_json(saved)


@pytest.mark.parametrize("damage", ["modules", "base_params", "trainable_params"])
def test_a_plan_with_a_key_missing_is_refused(saved, damage):
    del saved[damage]
    with pytest.raises(PlacementError, match=damage):
        ModulePlan.from_json(saved)


def test_a_module_that_is_not_one_is_refused(saved):
    saved["modules"][0] = "q_proj"
    with pytest.raises(PlacementError, match="not a saved plan"):
        ModulePlan.from_json(saved)
