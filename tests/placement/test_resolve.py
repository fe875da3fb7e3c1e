"""A placement resolves to exactly what it names, or to one line that says what is wrong."""

import pytest

from geometries import TINY
from loracle.config.run import PlacementConfig
from loracle.errors import PlacementError
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import ModulePlan, placement_label, resolve_placement

INVENTORY = inventory_from_architecture(TINY["llama"])


def resolve(placement: str | PlacementConfig, *, rank: int = 4, alpha: float = 8) -> ModulePlan:
    return resolve_placement(placement, inventory=INVENTORY, rank=rank, alpha=alpha)


def custom(*modules: str, layers: list[int] | None = None) -> PlacementConfig:
    return PlacementConfig(modules=list(modules), layers=layers)


def names(plan: ModulePlan) -> list[str]:
    return [module.name for module in plan.modules]


def test_a_module_kind_is_a_placement():
    assert names(resolve("up_proj")) == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]


def test_each_planned_module_carries_rank_alpha_shape_and_layer():
    module = resolve("k_proj", rank=5, alpha=10).modules[1]
    assert (module.rank, module.alpha, module.layer, module.kind) == (5, 10.0, 1, "k_proj")
    assert (module.in_features, module.out_features) == (32, 16)
    assert module.trainable_params == 5 * (32 + 16)


def test_kinds_full_names_and_globs_combine_and_duplicates_collapse():
    plan = resolve(
        custom("q_proj", "q_proj", "model.layers.2.self_attn.q_proj", "*.0.mlp.*", "lm_head")
    )
    assert names(plan) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "lm_head",
    ]


def test_everything_is_every_linear_layer_but_the_head():
    assert resolve(custom("*")).modules == resolve("all-linear").modules
    assert names(resolve(custom("*", layers=[1]))) == names(resolve(custom("*.1.*")))
    assert names(resolve(custom("*", "lm_head")))[-1] == "lm_head"
    assert names(resolve(custom("**")))[-1] == "lm_head"


def test_layers_restrict_every_entry():
    plan = resolve(custom("q_proj", "*mlp.up*", layers=[2, 0, 2]))
    assert {(module.kind, module.layer) for module in plan.modules} == {
        ("q_proj", 0),
        ("up_proj", 0),
        ("q_proj", 2),
        ("up_proj", 2),
    }


@pytest.mark.parametrize(
    ("placement", "label"),
    [
        ("all-linear", "all-linear"),
        (custom("v_proj", "q_proj", layers=[3, 0, 1, 2, 7]), "q_proj+v_proj@0-3,7"),
        (custom("q_proj", "v_proj", "q_proj"), "q_proj+v_proj"),
        (custom("q_proj", layers=[1]), "q_proj@1"),
    ],
)
def test_a_label_reads_well_and_does_not_depend_on_order(placement, label):
    assert placement_label(placement) == label


def test_a_long_label_is_short_and_still_its_own():
    many = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    label, other = placement_label(custom(*many)), placement_label(custom(*many, "lm_head"))
    assert label.startswith("model.layers.0.self_attn.q_proj+2~")
    assert max(len(label), len(other)) <= 60
    assert label != other
    assert placement_label(custom("x" * 70)).startswith("x" * 40 + "~")


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("atention", ["placement 'atention': no such preset", "did you mean 'attention'?"]),
        ("q_prj", ["kinds: q_proj, k_proj", "did you mean 'q_proj'?"]),
        ("every-2th", ["did you mean 'every-2nd'?"]),
        ("last", ["first-N, last-N, every-Nth"]),
        ("last-2nd", ["no such preset"]),
        ("last-02", ["did you mean 'last-2'?"]),
        ("two\nlines", ["placement 'two lines': no such preset"]),
        (custom("two\nlines"), ["modules: 'two lines' matches no linear layer"]),
        ("every-2", ["did you mean 'every-2nd'?"]),
        ("*.q_proj", ["placement: {modules: ['*.q_proj']}"]),
        ("model.layers.0.mlp.up_proj", ["goes in a list"]),
        (custom("q_proj", "FAKE_proj"), ["placement 'FAKE_proj+q_proj': modules: 'FAKE_proj'"]),
        (custom("k_prj"), ["matches no linear layer", "did you mean 'k_proj'?"]),
        (custom("model.layers.1.mlp.up_prj"), ["did you mean 'model.layers.1.mlp.up_proj'?"]),
        (custom("completely.different"), ["matches no linear layer (kinds: q_proj"]),
        (custom("self_attn.q_proj"), ["did you mean '*.self_attn.q_proj'?"]),
        (custom("attention"), ["a preset stands alone: placement: attention"]),
        (custom("*.9.mlp.*"), ["'*.9.mlp.*' matches no linear layer"]),
        (custom("embed_tokens"), ["'embed_tokens' matches no linear layer"]),
        (custom("q_proj", layers=[3, 99]), ["layers: 3, 99 not in the model", "layers 0 to 2"]),
        (custom("lm_head", layers=[0]), ["'lm_head' is outside the layers"]),
        (
            custom("q_proj", "model.layers.1.mlp.up_proj", layers=[0]),
            ["'model.layers.1.mlp.up_proj' is only in layers 1"],
        ),
        (
            custom("model.layers.1.mlp.up_proj", layers=[0, 1]),
            ["layers: none of these modules is in 0"],
        ),
    ],
)
def test_what_matches_nothing_is_one_line_with_the_nearest_choice(placement, expected):
    with pytest.raises(PlacementError) as caught:
        resolve(placement)
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert message.startswith("placement '")
    assert "\n" not in message


@pytest.mark.parametrize(("rank", "alpha"), [(0, 8.0), (-1, 8.0), (4, 0.0), (4, float("nan"))])
def test_rank_and_alpha_must_be_positive(rank, alpha):
    with pytest.raises(PlacementError, match="both must be positive"):
        resolve("all-linear", rank=rank, alpha=alpha)


def test_the_lowest_layer_is_where_backpropagation_may_stop():
    assert resolve("last-1").lowest_layer == 2
    assert resolve(custom("q_proj", "lm_head", layers=None)).lowest_layer == 0
    assert resolve("lm-head").lowest_layer is None
