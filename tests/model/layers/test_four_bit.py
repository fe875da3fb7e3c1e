"""A base in 4 bits computes with its unpacked weights, trains, and is never changed."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from loracle.engine.train import train_bundle
from loracle.errors import ModelError
from loracle.model.adapters import attach_adapter
from loracle.model.inventory import inventory_of
from loracle.model.layers.four_bit import (
    FUSED_ROWS,
    PackedWeight,
    four_bit_config,
    num_numbers,
    weight_of,
)
from loracle.model.load import load_base
from loracle.placement import resolve_placement
from loracle.screen import quiet_transformers
from tiny import save_tiny_model
from tiny_engine import examples_of, tiny_run

CPU = torch.device("cpu")
EXAMPLES = examples_of(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("packed") / "model")


def packed_base(folder, dtype=torch.float32):
    return load_base(folder, device=CPU, dtype=dtype, quantization="nf4")


def unpacked_base(folder, dtype=torch.float32):
    """A dense base whose weights are the packed one's, made whole."""
    base = load_base(folder, device=CPU, dtype=dtype)
    packed = packed_base(folder, dtype)
    for name, module in packed.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = weight_of(module)
            if isinstance(weight, PackedWeight):
                base.model.get_submodule(name).weight.data.copy_(weight.whole(dtype))
    return base


def stepped(base, placement="all-linear", *, checkpointing=False, steps=1):
    plan = resolve_placement(placement, inventory=inventory_of(base.model), rank=4, alpha=8.0)
    adapter = attach_adapter(
        base, name="default", plan=plan, dropout=0.1, seed=0, model_source="tiny"
    )
    run = tiny_run(
        base, adapter, EXAMPLES, dropout=0.1, batch_size=4, max_steps=8, learning_rate=0.01,
        warmup_frac=0.0,
    )  # fmt: skip
    bundle = train_bundle(base, [run], micro_batch_tokens=40, checkpointing=checkpointing)
    losses = [next(bundle)[0].loss_nats_per_token for _ in range(steps)]
    return losses, {name: p.detach().clone() for name, p in adapter.parameters.items()}


def test_linear_layers_but_the_head_are_packed(folder):
    base = packed_base(folder)
    kinds = {
        name.rpartition(".")[2]: type(weight_of(module)).__name__
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert kinds.pop("lm_head") == "Parameter"
    assert set(kinds.values()) == {"PackedWeight"}
    assert len(kinds) == 7


def test_the_inventory_is_the_dense_model_s(folder):
    dense = inventory_of(load_base(folder, device=CPU, dtype=torch.float32).model)
    assert inventory_of(packed_base(folder).model) == dense
    assert num_numbers(torch.nn.Parameter(torch.zeros(3, 5))) == 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", ["all-linear", "attention-qv", "last-1", "lm-head"])
def test_it_trains_as_a_dense_base_with_the_unpacked_weights(folder, placement, dtype):
    losses, tensors = stepped(packed_base(folder, dtype), placement, steps=2)
    wanted_losses, expected = stepped(unpacked_base(folder, dtype), placement, steps=2)
    assert losses == wanted_losses
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_checkpointing_changes_no_bit(folder):
    losses, tensors = stepped(packed_base(folder), steps=2)
    again, reference = stepped(packed_base(folder), steps=2, checkpointing=True)
    assert losses == again
    assert all(torch.equal(tensors[name], reference[name]) for name in tensors)


def test_no_weight_changes_and_the_loss_falls(folder):
    base = packed_base(folder)
    before = base.weights_digest()
    losses, _ = stepped(base, steps=8)
    assert losses[-1] < losses[0]
    ids = torch.tensor([EXAMPLES[0].input_ids])
    with base.generating(()) as model:
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert base.weights_digest() == before
    assert packed_base(folder).weights_digest() == before
    assert load_base(folder, device=CPU, dtype=torch.float32).weights_digest() != before


def test_its_products_are_bitsandbytes_own(folder):
    ids = torch.tensor([EXAMPLES[0].input_ids])
    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=four_bit_config(torch.float32)
        )
    # In training mode it computes as on a GPU; in evaluation it rounds its scales on some CPUs.
    stock.train()
    base = packed_base(folder)
    with torch.no_grad():
        reference = stock(input_ids=ids).logits
        with base.generating(()) as model:
            candidate = model(input_ids=ids).logits
    torch.testing.assert_close(candidate, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_product_of_packed_weights_is_that_of_unpacked_ones(folder, dtype, rows):
    layer = packed_base(folder, dtype).model.get_submodule("model.layers.1.mlp.down_proj")
    weight = weight_of(layer)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.linspace(-1, 1, 32).to(dtype)
    with torch.inference_mode():
        fused = weight.product(x, bias)
        unpacked = torch.nn.functional.linear(x, weight.whole(dtype), bias)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(fused, unpacked, rtol=4 * step, atol=4 * step)


def test_only_a_few_decoded_tokens_on_a_gpu_are_multiplied_by_packed_weights(folder):
    weight = weight_of(packed_base(folder).model.get_submodule("model.layers.1.mlp.down_proj"))

    def fused(rows, *, features=64, device="cuda"):
        shape = (rows, features)
        x = SimpleNamespace(shape=shape, numel=lambda: rows * features, device=torch.device(device))
        return weight.is_fused(x)

    assert not fused(1), "a score"
    with torch.inference_mode():
        assert [fused(rows) for rows in (0, 1, FUSED_ROWS, FUSED_ROWS + 1)] == [0, 1, 1, 0]
        assert not fused(1, device="cpu")
        assert not fused(1, features=48), "bitsandbytes would warn and unpack"


def test_without_bitsandbytes_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("loracle.model.layers.four_bit.find_spec", lambda _name: None)
    assert importlib.util.find_spec("bitsandbytes") is not None
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        packed_base(folder)
