"""The fast RMSNorm is the model's own, keeps less for the gradient, and replaces nothing else."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loracle.model.layers.norm import install_fast_norms, rms_norm
from tiny_engine import FAMILIES, examples_of, stock_model, stock_nll


def drawn_norm(features: int = 48, *, dtype: torch.dtype = torch.float32) -> LlamaRMSNorm:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(features, eps=1e-5)
    nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    return norm.to(dtype).requires_grad_(False)


def outcome(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    out = norm(x)
    out.backward(grad)
    return [out.detach(), x.grad]


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 2e-4)]
)
def test_output_and_gradient_are_the_models_own(dtype, within):
    norm = drawn_norm(dtype=dtype)
    x, grad = (torch.randn(3, 7, 48).to(dtype) for _ in range(2))
    reference = outcome(norm, x, grad)
    assert install_fast_norms(norm) == 1
    for candidate, expected in zip(outcome(norm, x, grad), reference, strict=True):
        assert candidate.dtype == dtype
        assert (candidate.float() - expected.float()).norm() <= within * expected.float().norm()


def test_the_written_gradient_is_the_numerical_one():
    weight = torch.randn(5, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight=weight, epsilon=1e-3), (x,))


def test_no_wide_copy_of_the_input_is_kept():
    norm = drawn_norm(dtype=torch.bfloat16)
    x = torch.randn(100, 48, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight=norm.weight, epsilon=1e-5)
    assert sorted(t.nbytes for t in kept) == [48 * 2, 100 * 4, 100 * 48 * 2]


def test_a_norm_of_another_kind_is_left_alone():
    """Gemma multiplies by 1 + w."""
    norm = GemmaRMSNorm(16).requires_grad_(False)
    nn.init.normal_(norm.weight, std=0.1)
    forward = norm.forward
    assert install_fast_norms(norm) == 0
    assert norm.forward == forward


def test_a_norm_that_trains_is_left_alone():
    assert install_fast_norms(drawn_norm().requires_grad_(True)) == 0


def test_a_norm_that_changes_the_dtype_is_left_alone():
    class WideRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states).double()

    assert install_fast_norms(WideRMSNorm(16).requires_grad_(False)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_changes_its_loss(family):
    model, example = stock_model(family), examples_of(1)[0]
    model.requires_grad_(False)
    before = stock_nll(model, example)
    install_fast_norms(model)
    torch.testing.assert_close(stock_nll(model, example), before, rtol=1e-5, atol=1e-6)


def test_every_norm_of_a_llama_is_replaced():
    model = stock_model("llama").requires_grad_(False)
    # Two a layer and one at the end.
    assert install_fast_norms(model) == 2 * model.config.num_hidden_layers + 1
