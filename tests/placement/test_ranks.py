"""Ranks of single modules: the narrowest key decides, and a key that decides nothing is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from geometries import TINY
from loracle.config.files import dump_yaml, load_config, parse_config
from loracle.config.run import PlacementConfig, config_digest, identity
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import ModulePlan, placement_label, resolve_placement
from placement.drawn import prove

INVENTORY = inventory_from_architecture(TINY["llama"])
Q0, Q1, UP1 = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
)


def resolve(
    ranks: dict[str, int], *modules: str, layers: list[int] | None = None, alpha: float = 8.0
) -> ModulePlan:
    placement = PlacementConfig(modules=list(modules) or ["*"], layers=layers, ranks=ranks)
    return resolve_placement(placement, inventory=INVENTORY, rank=4, alpha=alpha)


def by_name(plan: ModulePlan) -> dict[str, int]:
    return {module.name: module.rank for module in plan.modules}


def refusal(ranks: dict[str, int], *modules: str, layers: list[int] | None = None) -> str:
    with pytest.raises(PlacementError) as caught:
        resolve(ranks, *modules, layers=layers)
    message = str(caught.value)
    assert message.startswith("placement '")
    assert "\n" not in message
    return message


def test_what_has_no_rank_of_its_own_has_the_runs():
    found = by_name(resolve({"down_proj": 2, "layers:2": 6}))
    assert found["model.layers.0.mlp.down_proj"] == 2
    assert found["model.layers.2.mlp.up_proj"] == 6
    assert found[UP1] == 4
    assert len(found) == 21


def test_a_full_name_goes_before_a_pattern_before_a_kind_before_layers():
    keys = {"layers:0-1": 2, "q_proj": 3, "*.0.self_attn.*": 5, Q0: 7}
    for ranks in (keys, dict(reversed(keys.items()))):
        found = by_name(resolve(ranks))
        assert found[Q0] == 7
        assert found["model.layers.0.self_attn.k_proj"] == 5
        assert found[Q1] == found["model.layers.2.self_attn.q_proj"] == 3
        assert found[UP1] == 2
        assert found["model.layers.2.mlp.up_proj"] == 4


def test_every_update_is_scaled_alike():
    plan = resolve({"down_proj": 3, "layers:2": 7}, alpha=0.1)
    assert {module.rank for module in plan.modules} == {3, 4, 7}
    for module in plan.modules:
        assert module.alpha / module.rank == pytest.approx(0.025, rel=1e-15)
    assert {m.alpha for m in plan.modules if m.rank == 4} == {0.1}


def test_layers_are_listed_singly_and_in_ranges():
    found = resolve({"layers:0,2": 9}, "v_proj")
    assert [module.rank for module in found.modules] == [9, 4, 9]
    assert [module.rank for module in resolve({"layers:1-2": 9}, "v_proj").modules] == [4, 9, 9]


def test_the_head_has_a_rank_of_its_own_if_it_is_adapted():
    found = by_name(resolve({"lm_head": 1}, "q_proj", "lm_head"))
    assert found == {f"model.layers.{layer}.self_attn.q_proj": 4 for layer in range(3)} | {
        "lm_head": 1
    }


def test_everything_does_not_mean_the_head():
    assert "lm_head" not in by_name(resolve({"q_proj": 8}))
    assert by_name(resolve({"*": 8}, "v_proj", "lm_head"))["lm_head"] == 4


def test_keys_may_meet_where_they_agree_or_a_narrower_one_decides():
    assert by_name(resolve({"*.q_proj": 2, "*.0.*": 2}))[Q0] == 2
    found = by_name(resolve({"*.q_proj": 2, "*.0.*": 3, Q0: 5}))
    assert (found[Q0], found[Q1]) == (5, 2)


@pytest.mark.parametrize(
    ("ranks", "parts"),
    [
        ({"*.q_proj": 2, "*.0.*": 3}, ["'*.q_proj' (2) and '*.0.*' (3)", f"disagree on {Q0}"]),
        (
            {"layers:0-1": 2, "layers:1-2": 3},
            ["'layers:0-1' (2) and 'layers:1-2' (3) are equally specific"],
        ),
    ],
)
def test_keys_that_are_equally_specific_must_agree(ranks, parts):
    message = refusal(ranks)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("ranks", "part"),
    [
        ({"q_poj": 2}, "'q_poj' matches no module of this placement (kinds: q_proj, up_proj;"),
        ({"q_poj": 2}, "did you mean 'q_proj'?"),
        ({"down_proj": 2}, "'down_proj' matches no module of this placement"),
        ({"model.layers.1.mlp.up_prj": 2}, f"did you mean '{UP1}'?"),
        ({"lm_head": 2}, "'lm_head' matches no module"),
        ({"*.7.*": 2}, "'*.7.*' matches no module"),
        ({"two\nlines": 2}, "'two lines' matches no module"),
        ({"q_proj": 2, "*.q_proj": 3}, "'q_proj' decides nothing"),
        ({"layers:0-3": 2}, "'layers:0-3': 3 not in the model, which has layers 0 to 2"),
        ({"layers:0-999999": 2}, "999999 not in the model"),
        ({"layers:2-1": 2}, "'layers:2-1': layers are written as in layers:0-3,7"),
        *(
            ({f"layers:{odd}": 2}, "layers are written as in layers:0-3,7")
            for odd in ("", "a", "-1", "0-", "0,,1", "0 - 1", "1.0", "٣", "9" * 5000)
        ),
    ],
)
def test_a_key_that_decides_nothing_is_refused(ranks, part):
    assert part in refusal(ranks, "q_proj", "up_proj")


def test_a_layer_without_modules_is_refused():
    message = refusal({"layers:0-2": 2}, "q_proj", layers=[1])
    assert "'layers:0-2': this placement has no module in 0,2" in message


@pytest.mark.parametrize("ranks", [{}, {"q_proj": 0}, {"q_proj": 2.0}, {"q_proj": True}, {1: 2}])
def test_ranks_are_positive_whole_numbers_by_name(ranks):
    with pytest.raises(ValidationError, match="ranks"):
        PlacementConfig(modules=["q_proj"], ranks=ranks)


KEYS = (
    Q0,
    Q1,
    UP1,
    "*.q_proj",
    "*.0.*",
    "*mlp*",
    "*",
    "q_proj",
    "up_proj",
    "layers:0",
    "layers:1-2",
)


def tier(key: str, name: str) -> int | None:
    """How narrowly a key of KEYS names a module; None: not at all."""
    layer, part, kind = name.split(".")[2:]
    if key.startswith("layers:"):
        return 3 if layer in {"layers:0": "0", "layers:1-2": "12"}[key] else None
    if key in (name, kind):
        return 0 if key == name else 2
    globs = {"*.q_proj": kind == "q_proj", "*.0.*": layer == "0", "*mlp*": part == "mlp", "*": True}
    return 1 if globs.get(key) else None


@prove
@given(st.dictionaries(st.sampled_from(KEYS), st.integers(1, 3), min_size=1, max_size=5))
def test_ranks_are_taken_if_and_only_if_each_key_decides_and_none_contradicts(ranks):
    expected, decisive, contradiction = {}, set(), False
    for module in INVENTORY.modules:
        if module.role == "head":
            continue
        tiers = {key: found for key in ranks if (found := tier(key, module.name)) is not None}
        best = [key for key, found in tiers.items() if found == min(tiers.values())]
        contradiction |= len({ranks[key] for key in best}) > 1
        decisive.update(best)
        expected[module.name] = ranks[best[0]] if best else 4
    if contradiction or decisive != set(ranks):
        refusal(ranks)
    else:
        assert by_name(resolve(ranks)) == expected


def test_a_label_tells_ranks_apart_and_not_their_order():
    def label(ranks: dict[str, int] | None) -> str:
        return placement_label(PlacementConfig(modules=["*"], layers=[0, 1], ranks=ranks))

    assert label({"q_proj": 8, "layers:0": 2}) == "*@0-1:layers:0=2,q_proj=8"
    assert label({"layers:0": 2, "q_proj": 8}) == label({"q_proj": 8, "layers:0": 2})
    assert label(None) == "*@0-1"
    long = label({Q0: 8, UP1: 2})
    assert len(long) <= 60
    assert long != label({Q0: 8, UP1: 3})


def with_placement(placement: str) -> str:
    return f"lora.placement={placement}"


def test_configs_without_ranks_are_what_they_were_before_there_were_any():
    config = load_config(overrides=[with_placement("{modules: [q_proj], layers: [0]}")])
    assert identity(config)["lora"]["placement"] == {"modules": ["q_proj"], "layers": [0]}
    given_none = load_config(
        overrides=[with_placement("{modules: [q_proj], layers: [0], ranks: null}")]
    )
    assert config_digest(given_none) == config_digest(config)
    assert "ranks" not in dump_yaml(config.model_dump(mode="json"))


def test_ranks_are_part_of_what_a_run_is_and_survive_its_file():
    one, same, other = (
        load_config(overrides=[with_placement(f"{{modules: ['*'], ranks: {ranks}}}")])
        for ranks in (
            "{'layers:0-3,7': 8, '*.q_proj': 4}",
            "{'*.q_proj': 4, 'layers:0-3,7': 8}",
            "{'layers:0-3,7': 8, '*.q_proj': 5}",
        )
    )
    assert config_digest(one) == config_digest(same) != config_digest(other)
    tree = one.model_dump(mode="json")
    assert parse_config(tree, origin="again") == one
    assert tree["lora"]["placement"]["ranks"] == {"layers:0-3,7": 8, "*.q_proj": 4}
