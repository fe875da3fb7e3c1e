"""Scores are what stock PEFT and stock Transformers give, and leave the base as it was."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from loracle.config.run import PlacementConfig
from loracle.data import Example
from loracle.data.packing import pack
from loracle.errors import ModelError, NonFiniteError, PlacementError
from loracle.model.adapters import initial_a
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.model.scores import score_modules
from loracle.placement import SCORES, LinearModule
from tiny_engine import (
    FAMILIES,
    attach,
    examples_of,
    packed_nll,
    peft_tensors,
    stock_model,
    stock_nll,
    stock_peft,
    tiny_base,
    tiny_plan,
)

EXAMPLES = examples_of(6)
DOWN = "model.layers.1.mlp.down_proj"


def scores_of(
    base: FrozenBase, score: str, *, examples: Sequence[Example] = EXAMPLES, **changes: int
) -> dict[str, float]:
    settings = {"seed": 3, "rank": 4, "batch_size": 4, "micro_batch_tokens": 25} | changes
    return score_modules(base, examples, score=score, **settings)


def candidates(family: str) -> list[LinearModule]:
    modules = inventory_of(stock_model(family)).modules
    return [module for module in modules if module.role != "head"]


def assert_alike(
    candidate: dict[str, float], reference: dict[str, float], *, rel: float = 1e-3
) -> None:
    assert list(candidate) == list(reference)
    assert candidate == pytest.approx(reference, rel=rel)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_energy_is_that_of_stock_peft(family):
    modules = candidates(family)
    peft = stock_peft(stock_model(family), tiny_plan(family=family, rank=4, alpha=4), like=None)
    tensors = peft_tensors(peft)
    for module in modules:
        a = initial_a(module.name, rank=4, features=module.in_features, seed=3)
        tensors[f"{module.name}.lora_A"].data.copy_(a)
    energies = {module.name: 0.0 for module in modules}
    for batch in (EXAMPLES[:4], EXAMPLES[4:]):
        peft.zero_grad()
        (torch.cat([stock_nll(peft, example) for example in batch]).mean()).backward()
        for module in modules:
            grad = tensors[f"{module.name}.lora_B"].grad
            size = 4 * (module.in_features + module.out_features)
            energies[module.name] += grad.square().sum().item() / size / 2
    assert_alike(scores_of(tiny_base(family), "gradient-energy"), energies)
    assert max(energies.values()) > 3 * min(energies.values()) > 0


@pytest.mark.parametrize("score", ["gradient-energy", "feature-norm", "weight-gradient"])
def test_scores_are_copied_from_the_device_together(score, monkeypatch):
    """Each copy waits for a GPU; indexing by a condition waits too, to know how many rows."""
    base, waits = tiny_base(), []
    for name in ("item", "tolist", "nonzero", "__bool__"):
        real = getattr(Tensor, name)

        def counted(self, *args, real=real, name=name):
            waits.append(name)
            return real(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    scores_of(base, score)
    assert waits.count("tolist") <= 2
    assert set(waits) == {"tolist"}


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_gradient_is_that_of_stock_transformers(family):
    modules = candidates(family)
    model = stock_model(family)
    sums = {module.name: 0.0 for module in modules}
    for example in EXAMPLES:
        model.zero_grad()
        stock_nll(model, example).sum().backward()
        for module in modules:
            weight = model.get_submodule(module.name).weight
            sums[module.name] += (weight * weight.grad).abs().sum().item()
    targets = sum(example.num_targets for example in EXAMPLES)
    expected = {
        module.name: sums[module.name] / targets / (module.in_features + module.out_features)
        for module in modules
    }
    assert_alike(scores_of(tiny_base(family), "weight-gradient"), expected)


def inputs_of(model: torch.nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """What each layer of a stock model reads, token by token, of all examples."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, _layer: object, args: tuple[Tensor], _out: Tensor) -> None:
        seen[name].append(args[0].reshape(-1, args[0].shape[-1]))

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(keep, name))
    with torch.no_grad():
        for example in EXAMPLES:
            model(input_ids=torch.tensor([example.input_ids]))
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_feature_norm_is_the_one_of_the_weight_without_its_bias(family):
    modules = candidates(family)
    model = stock_model(family)
    inputs = inputs_of(model, [module.name for module in modules])
    expected = {}
    for module in modules:
        weight = model.get_submodule(module.name).weight.detach()
        weight = weight.T if module.fan_in_fan_out else weight
        ratios = [
            (weight @ x).norm().item()
            / (x.norm() * weight.norm() / math.sqrt(module.in_features)).item()
            for x in inputs[module.name]
        ]
        expected[module.name] = 1 / (sum(ratios) / len(ratios))
    assert_alike(scores_of(tiny_base(family), "feature-norm"), expected)


def test_features_of_random_inputs_have_the_norm_that_ours_are_compared_with():
    weight = stock_model().get_submodule(DOWN).weight.detach()
    random = torch.randn(20_000, 48, generator=torch.Generator().manual_seed(0))
    directions = random / random.norm(dim=1, keepdim=True)
    drawn = (directions @ weight.T).norm(dim=1).square().mean().sqrt()
    assert drawn.item() == pytest.approx(weight.norm().item() / math.sqrt(48), rel=0.01)


def test_a_small_gradient_step_lowers_the_loss_by_the_rate_times_the_energy():
    base = tiny_base()
    score = scores_of(base, "gradient-energy", batch_size=6)[DOWN]
    energy = score * 4 * (48 + 32)
    adapter = attach(
        base, tiny_plan(PlacementConfig(modules=[DOWN]), rank=4, alpha=4), seed=3, spread_b=None
    )
    row = pack(EXAMPLES)
    b = adapter.parameters[f"{DOWN}.lora_B"]
    packed_nll(base, row, adapter="default").mean().backward()
    grad, rate = b.grad.clone(), 0.01 / b.grad.norm().item()
    losses = []
    for sign in (-1, 1):
        with torch.no_grad():
            b.copy_(sign * rate * grad)
            losses.append(packed_nll(base, row, adapter="default").double().mean().item())
    assert (losses[1] - losses[0]) / (2 * rate) == pytest.approx(energy, rel=0.01)


@pytest.mark.parametrize("score", SCORES)
def test_how_examples_are_packed_does_not_matter(score):
    base = tiny_base()
    expected = scores_of(base, score, micro_batch_tokens=1)
    for tokens in (25, 60, 10_000):
        assert_alike(scores_of(base, score, micro_batch_tokens=tokens), expected, rel=1e-4)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_is_bitwise_what_it_was_and_carries_nothing(score, family):
    base = tiny_base(family)
    digest, inventory = base.weights_digest(), inventory_of(base.model)
    scores_of(base, score)
    assert base.weights_digest() == digest
    assert inventory_of(base.model) == inventory
    assert base.peft is None
    assert not any(module._forward_hooks for module in base.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_a_score_is_a_function_of_its_seed(score):
    base = tiny_base()
    first, again = scores_of(base, score), scores_of(tiny_base(), score)
    assert first == again
    assert (scores_of(base, score, seed=4) == first) == (score != "gradient-energy")


def test_it_does_not_matter_who_switched_gradients_off():
    base = tiny_base()
    expected = scores_of(base, "gradient-energy")
    with torch.no_grad():
        assert scores_of(base, "gradient-energy") == expected


def test_the_energy_does_not_grow_with_the_rank_it_is_measured_at():
    base = tiny_base()
    few, many = (scores_of(base, "gradient-energy", rank=rank) for rank in (8, 128))
    ratios = [few[name] / many[name] for name in many]
    assert 0.7 < np.mean(ratios) < 1.4


@pytest.mark.parametrize("score", SCORES)
def test_a_16_bit_base_ranks_its_modules_alike(score):
    wide = scores_of(tiny_base(), score)
    narrow = scores_of(tiny_base(dtype=torch.bfloat16), score)
    logs = [[math.log(result[name]) for name in wide] for result in (wide, narrow)]
    assert np.corrcoef(logs)[0, 1] > 0.98


def in_halves(mlp: torch.nn.Module) -> None:
    """Lets a feed-forward part read its tokens in two calls, as experts read theirs."""
    whole = type(mlp).forward
    mlp.forward = lambda x: torch.cat([whole(mlp, x[:, :5]), whole(mlp, x[:, 5:])], dim=1)


@pytest.mark.parametrize("score", ["gradient-energy", "feature-norm"])
def test_a_layer_that_reads_its_tokens_in_pieces_scores_the_same(score):
    expected, base = scores_of(tiny_base(), score), tiny_base()
    in_halves(base.model.model.layers[1].mlp)
    assert_alike(scores_of(base, score), expected, rel=1e-4)


def test_gradients_by_example_need_whole_sequences_and_the_hooks_go_all_the_same():
    base = tiny_base()
    in_halves(base.model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"^score 'weight-gradient': model\.layers\.1\.mlp\.\w+ d"):
        scores_of(base, "weight-gradient")
    assert not any(module._forward_hooks for module in base.model.modules())


def test_a_layer_that_nothing_passes_through_has_no_gradient_and_no_features():
    base = tiny_base()
    base.model.model.layers[1].mlp.forward = lambda x: x
    scores = scores_of(base, "gradient-energy")
    assert [name for name, score in scores.items() if not score] == [
        f"model.layers.1.mlp.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")
    ]
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj is never computed"):
        scores_of(base, "feature-norm")


def test_inputs_of_nothing_but_zeros_are_left_out_of_the_features():
    base = tiny_base()
    mlp = base.model.model.layers[1].mlp
    whole = type(mlp).forward

    def first_token_dead(x: Tensor) -> Tensor:
        return whole(mlp, torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1))

    mlp.forward = first_token_dead
    scores = scores_of(base, "feature-norm")
    assert all(math.isfinite(score) and score > 0 for score in scores.values())


@pytest.mark.parametrize("score", SCORES)
def test_numbers_that_are_none_are_refused(score):
    base = tiny_base()
    base.model.get_submodule(DOWN).weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=rf"^score '{score}' of model\.layers\.\d\.\S+ is nan"):
        scores_of(base, score)


def test_a_base_with_adapters_is_refused():
    base = tiny_base()
    attach(base, tiny_plan("attention"))
    with pytest.raises(ModelError, match="already carries adapters"):
        scores_of(base, "feature-norm")


def test_an_unknown_score_is_refused_with_the_nearest():
    with pytest.raises(PlacementError) as caught:
        scores_of(tiny_base(), "gradient-enrgy")
    message = str(caught.value)
    assert message.startswith("score 'gradient-enrgy': there is no such score (there are gradient-")
    assert message.endswith("did you mean 'gradient-energy'?")
