"""Kept tensors are few, are let go when memory runs out, and serve a gradient whoever made them."""

import importlib
import pkgutil

import pytest
import torch

from loracle.engine.out_of_memory import free_memory
from loracle.model import layers
from loracle.model.layers import dropout, kept, stacked
from loracle.model.layers.dropout import DropoutStream
from loracle.model.layers.routing import Route
from loracle.model.layers.stacked import stacked_product

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    kept.forget_kept()


def product(*, x_needs_gradient: bool) -> torch.Tensor:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 8, requires_grad=x_needs_gradient), torch.randn(6, 8)
    a = [torch.randn(2, 8, requires_grad=x_needs_gradient) for _ in range(2)]
    b = [torch.randn(6, 2, requires_grad=x_needs_gradient) for _ in range(2)]
    streams = [DropoutStream(3000, 0, 0, (0,), (length,)) for length in (3, 4)]
    routes = (Route("a", 0, 3, streams[0]), Route("b", 3, None, streams[1]))
    factors = (a[0], b[0], a[1], b[1])
    return stacked_product(x, weight, None, "m", routes, (1.0, 2.0), *factors)


def test_what_inference_made_trains_too():
    """'Inference tensors cannot be saved for backward' was the fault."""
    with torch.inference_mode():
        product(x_needs_gradient=False)
    assert kept.num_kept() > 0
    product(x_needs_gradient=True).sum().backward()


def test_block_masks_of_past_passes_are_dropped():
    for stop in range(2, 50):
        stacked._block(((0, 1), (1, stop)), (2, 2), CPU, torch.float32)
    assert kept.num_kept() <= 4


def test_keys_of_past_passes_are_dropped():
    for step in range(100):
        dropout._token_keys(DropoutStream(1, 0, step, (0,), (5,)), CPU)
    assert kept.num_kept() <= 64


def test_memory_that_runs_out_gets_them_back():
    product(x_needs_gradient=True)
    assert kept.num_kept() > 0
    free_memory()
    assert kept.num_kept() == 0


def test_no_other_cache_of_the_layers_keeps_tensors():
    for place in pkgutil.iter_modules(layers.__path__):
        if place.name.endswith("kernels"):
            continue
        module = importlib.import_module(f"{layers.__name__}.{place.name}")
        for name, value in vars(module).items():
            if hasattr(value, "cache_info") and value not in kept._KEEPERS:
                returned = str(value.__wrapped__.__annotations__.get("return"))
                assert "Tensor" not in returned, f"{place.name}.{name}"
