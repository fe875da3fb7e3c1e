"""What no text reaches, or PEFT cannot adapt, is refused by name before anything trains."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from geometries import LATENT
from loracle.errors import ModelError
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.model.layers.lora import RoutedLinear
from loracle.model.layers.routing import Route
from loracle.model.reach import require_reached
from loracle.placement import ModulePlan, resolve_placement
from tiny_engine import FAMILIES, base_of, tiny_base


def plan_of(base: FrozenBase, placement: str = "all-linear") -> ModulePlan:
    inventory = inventory_of(base.model)
    return resolve_placement(placement, inventory=inventory, rank=2, alpha=4.0)


def is_untouched(base: FrozenBase) -> bool:
    layers = any(isinstance(module, RoutedLinear) for module in base.model.modules())
    return base.peft is None and not layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["all-linear", "lm-head", "full"])
def test_every_family_reaches_all_that_is_planned_and_is_left_as_it_was(family, placement):
    base = tiny_base(family)
    before = base.weights_digest()
    require_reached(base, plan=plan_of(base, placement))
    assert is_untouched(base)
    assert base.weights_digest() == before


def test_a_module_that_no_pass_calls_is_named():
    base = tiny_base()
    for layer in base.model.model.layers:
        layer.mlp.spare_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(ModelError, match=r"no gradient to model.layers.0.mlp.spare_proj, .* leave"):
        require_reached(base, plan=plan_of(base))
    assert is_untouched(base)
    with pytest.raises(ModelError, match=r"text never reaches model.layers.0.mlp.spare_proj"):
        require_reached(base, plan=plan_of(base, "full"))


def test_a_weight_of_the_model_itself_is_reached():
    base = tiny_base()
    base.model.scale = nn.Parameter(torch.ones(1))
    require_reached(base, plan=plan_of(base, "full"))


def test_a_module_whose_output_is_dropped_is_named():
    base = tiny_base()
    mlp = base.model.model.layers[1].mlp
    mlp.register_forward_hook(lambda _module, _args, out: out.detach())
    with pytest.raises(ModelError, match=r"gradient to model.layers.1.mlp.gate_proj"):
        require_reached(base, plan=plan_of(base, "feed-forward"))


def test_a_layer_that_sees_some_of_the_rows_is_named():
    base = tiny_base()
    mlp = base.model.model.layers[0].mlp
    mlp.forward = lambda x: torch.cat([mlp.down_proj(x[0, :5]), x[0, 5:]])[None]
    mlp.down_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj: sees 5 rows of a pass over 32"):
        require_reached(base, plan=plan_of(base, "feed-forward"))


def test_what_peft_cannot_adapt_is_one_line():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LATENT))
    base = base_of(model)
    with pytest.raises(ModelError, match=r"^DeepseekV2ForCausalLM: PEFT cannot adapt") as caught:
        require_reached(base, plan=plan_of(base))
    assert "\n" not in str(caught.value)
    base = base_of(model)
    require_reached(base, plan=plan_of(base, "attention"))


def test_routes_follow_the_rows_of_a_layer():
    router = tiny_base().router
    routes = (Route("a", 0, 1), Route("b", 1, 3))
    with router.following(routes, units=3):
        assert router.routes_of((3, 8), module="m") == routes
        wide = (Route("a", 0, 4), Route("b", 4, 12))
        assert router.routes_of((3, 4, 8), module="m") == wide
        assert router.routes_of((12, 8), module="m") == wide
        for shape in ((2, 4, 8), (4, 3, 2, 8), (7, 8)):
            with pytest.raises(ModelError, match=r"^m: sees"):
                router.routes_of(shape, module="m")
    with router.following((Route("a", 0, 3),), units=3):
        assert router.routes_of((7, 8), module="m") == (Route("a"),)
