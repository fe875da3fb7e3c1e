"""What holds for every model and every placement, drawn by Hypothesis."""

import json
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.config.run import PlacementConfig
from loracle.errors import PlacementError
from loracle.placement import (
    PATTERNS,
    PRESETS,
    Inventory,
    LinearModule,
    ModulePlan,
    resolve_placement,
    select_modules,
)
from placement.drawn import KINDS, inventories, prove

entries = st.one_of(
    st.sampled_from([*KINDS, "lm_head", "*", "*mlp*", "*.[0-3].*", "*.1.*", "fake_proj", "*.fake"]),
    st.builds(
        lambda layer, kind: f"model.layers.{layer}.{KINDS[kind]}.{kind}",
        st.integers(0, 10),
        st.sampled_from(sorted(KINDS)),
    ),
    st.text(min_size=1, max_size=8),
)
customs = st.builds(
    PlacementConfig,
    modules=st.lists(entries, min_size=1, max_size=4),
    layers=st.none() | st.lists(st.integers(0, 10), min_size=1, max_size=4),
)
counted = st.builds("{}-{}".format, st.sampled_from(["first", "last"]), st.integers(0, 10))
placements = st.one_of(st.sampled_from([*PRESETS, *PATTERNS, *KINDS]), counted, customs)
ranks = st.integers(1, 64)


def matches(entry: str, module: LinearModule) -> bool:
    if entry == "*":
        return module.role != "head"
    return entry in (module.kind, module.name) or fnmatchcase(module.name, entry)


def resolved(placement, inventory, *, rank=3, alpha=6.0) -> ModulePlan | None:
    try:
        return resolve_placement(placement, inventory=inventory, rank=rank, alpha=alpha)
    except PlacementError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return None


@prove
@given(inventories(), customs)
def test_a_custom_placement_is_accepted_if_and_only_if_all_of_it_matches(inventory, placement):
    layers = range(inventory.num_layers) if placement.layers is None else placement.layers
    reachable = [
        module
        for module in inventory.modules
        if module.layer in layers or (placement.layers is None and module.layer is None)
    ]
    hit = [m for m in reachable if any(matches(entry, m) for entry in placement.modules)]
    valid = (
        all(any(matches(entry, module) for module in reachable) for entry in placement.modules)
        and max(layers) < inventory.num_layers
        and (placement.layers is None or set(layers) == {module.layer for module in hit})
    )
    plan = resolved(placement, inventory)
    assert (plan is not None) == valid
    if plan is not None:
        assert [module.name for module in plan.modules] == [module.name for module in hit]


@prove
@given(inventories(), placements, ranks)
def test_the_count_is_the_closed_form(inventory, placement, rank):
    plan = resolved(placement, inventory, rank=rank)
    if plan is not None:
        widths = {m.name: m.in_features + m.out_features for m in inventory.modules}
        assert plan.trainable_params == rank * sum(widths[m.name] for m in plan.modules)
        assert plan.total_params - plan.trainable_params == inventory.total_params


@prove
@given(inventories(), placements)
def test_modules_are_never_empty_never_twice_and_in_the_models_order(inventory, placement):
    plan = resolved(placement, inventory)
    if plan is not None:
        order = [module.name for module in inventory.modules]
        positions = [order.index(module.name) for module in plan.modules]
        assert positions
        assert positions == sorted(set(positions))


@prove
@given(inventories(), customs, st.randoms(use_true_random=False))
def test_order_and_repetition_of_entries_do_not_matter(inventory, placement, random):
    modules, layers = placement.modules * 2, placement.layers
    random.shuffle(modules)
    shuffled = PlacementConfig(
        modules=modules, layers=None if layers is None else random.sample(layers, len(layers))
    )
    assert resolved(shuffled, inventory) == resolved(placement, inventory)


@prove
@given(inventories(), placements)
def test_resolving_the_resolved_names_gives_the_same_modules(inventory, placement):
    plan = resolved(placement, inventory)
    if plan is not None:
        by_name = PlacementConfig(modules=[module.name for module in plan.modules])
        again = resolved(by_name, inventory)
        assert again is not None
        assert again.modules == plan.modules


@prove
@given(inventories(), placements, ranks)
def test_a_plan_survives_json(inventory, placement, rank):
    plan = resolved(placement, inventory, rank=rank)
    if plan is not None:
        assert ModulePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@prove
@given(inventories())
def test_roles_part_all_linear_and_thirds_part_it_again(inventory):
    def chosen(placement: str) -> set[str]:
        plan = resolved(placement, inventory)
        return {module.name for module in plan.modules} if plan else set()

    everything = chosen("all-linear")
    assert chosen("attention") | chosen("feed-forward") == everything
    assert not chosen("attention") & chosen("feed-forward")
    assert everything | chosen("lm-head") == {module.name for module in inventory.modules}
    if inventory.num_layers >= 3:
        thirds = [chosen(name) for name in ("first-third", "middle-third", "last-third")]
        assert set.union(*thirds) == everything
        assert sum(map(len, thirds)) == len(everything)


@prove
@given(inventories())
def test_attention_qv_never_covers_some_layers_silently(inventory):
    attention = {module.layer for module in inventory.with_role("attention")}
    try:
        modules = select_modules("attention-qv", inventory=inventory)
    except PlacementError:
        return
    for kind in ("q_proj", "v_proj"):
        assert {module.layer for module in modules if module.kind == kind} == attention


@pytest.mark.parametrize("placement", ["", " ", "ALL-LINEAR", "last-", "-1", "last--1", "last-1.5"])
def test_odd_strings_are_refused(placement):
    inventory = Inventory((LinearModule("h.0.a", "a", 0, 1, 1, "attention"),), 1, 1)
    with pytest.raises(PlacementError):
        select_modules(placement, inventory=inventory)
