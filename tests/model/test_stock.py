"""A stock model over a base: Transformers' own modules, the base's memory, the same numbers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from loracle.errors import ModelError
from loracle.model.adapters import attach_adapter
from loracle.model.inventory import inventory_of
from loracle.model.load import load_base
from loracle.model.stock import stock_over
from loracle.placement import resolve_placement
from tiny_engine import CPU, FAMILIES, save_family, stock_model

IDS = torch.tensor([[3, 9, 27, 17, 51, 4]])


def loaded(folder, family="llama", **options):
    return load_base(save_family(folder, stock_model(family)), device=CPU, **options)


def adapted(base):
    plan = resolve_placement("all-linear", inventory=inventory_of(base.model), rank=4, alpha=8.0)
    attach_adapter(base, name="default", plan=plan, dropout=0.1, seed=0, model_source="tiny")
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_stock_model_and_takes_no_memory_for_weights(family, tmp_path):
    base = adapted(loaded(tmp_path, family, dtype=torch.float32))
    model = stock_over(base, folder=tmp_path)
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, stock_model(family)(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    held = {tensor.data_ptr() for tensor in base.held_tensors()}
    assert {parameter.data_ptr() for parameter in model.parameters()} <= held
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in type(module).__module__ for module in model.modules())


def test_nothing_of_ours_is_in_it(tmp_path):
    model = stock_over(loaded(tmp_path, dtype=torch.float32), folder=tmp_path)
    assert model.config._attn_implementation == "sdpa"
    kinds = {type(module) for module in model.modules()}
    assert {LlamaAttention, LlamaRMSNorm} <= kinds
    # Replaced forwards, as those of fast norms, are attributes of the module itself.
    assert not any("forward" in vars(module) for module in model.modules())


def test_packed_layers_are_bitsandbytes_own_over_the_same_memory(tmp_path):
    base = adapted(loaded(tmp_path, dtype=torch.float32, quantization="nf4"))
    digest = base.weights_digest()
    model = stock_over(base, folder=tmp_path)
    packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(packed) == 21
    assert all(module.weight.quant_state is not None for module in packed)
    # In training mode it computes as on a GPU; in evaluation it rewrites its weights on some CPUs.
    model.train()
    with torch.no_grad(), base.generating(()) as ours:
        expected = ours(input_ids=IDS).logits
    with torch.no_grad():
        result = model(input_ids=IDS).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert base.weights_digest() == digest


def test_a_base_of_another_model_is_refused(tmp_path):
    base = loaded(tmp_path / "llama", dtype=torch.float32)
    other = save_family(tmp_path / "gpt2", stock_model("gpt2"))
    with pytest.raises(ModelError, match="the base has no transformer"):
        stock_over(base, folder=other)
