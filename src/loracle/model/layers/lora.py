"""The LoRA layer of a packed row: one frozen product for all runs, one low-rank update per run.

    out[s:e] = x[s:e] W^T + scale * drop(x[s:e]) A^T B^T

Each run owns a slice [s, e) of the row. PEFT creates, names, saves and merges the adapters; this
layer, installed through PEFT's custom-module registration, only executes them. Without a route it
is PEFT's own layer, whose forward is also its oracle in the tests.

Shapes: T tokens in the row, I input and O output features, r rank.
Source: Hu et al. 2021 arXiv:2106.09685 section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from loracle.model.layers import masked
from loracle.model.layers.adapter_precision import add_update
from loracle.model.layers.four_bit import Weight, frozen_linear, weight_of, whole
from loracle.model.layers.fused import fused_product
from loracle.model.layers.masked import Mask
from loracle.model.layers.routing import Route, Router
from loracle.model.layers.stacked import stacked_product


class RoutedLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer that also follows a router."""

    router: Router | None = None
    module_name: str = ""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # One config serves every layer; PEFT corrects this field per layer only for its own class.
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output for ``x`` of shape (..., I)."""
        routes = None
        if self.router is not None:
            routes = self.router.routes_of(x.shape, module=self.module_name)
        if routes is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base = self.get_base_layer()
        weight = weight_of(base)
        bias = getattr(base, "bias", None)
        routes = tuple(route for route in routes if route.adapter in self.lora_A)
        factors = [
            factor
            for route in routes
            for factor in (self.lora_A[route.adapter].weight, self.lora_B[route.adapter].weight)
        ]
        scales = tuple(float(self.scaling[route.adapter]) for route in routes)
        flat = x.reshape(-1, x.shape[-1])
        product: Callable[..., Tensor]
        if not torch.is_grad_enabled():
            product = _product_as_peft
        elif routes and masked.multiplies_in_one_pass(flat, rank=sum(map(len, factors[::2]))):
            product = fused_product
        elif len(routes) > 1 and stacks_runs(x.device):
            product = stacked_product
        else:
            product = routed_product
        out = product(flat, weight, bias, self.module_name, routes, scales, *factors)
        return out.view(*x.shape[:-1], -1)


def stacks_runs(device: torch.device) -> bool:
    """Returns True where runs are multiplied together rather than one after another."""
    return device.type == "cuda"


def _product_as_peft(
    x: Float[Tensor, "T I"],
    weight: Weight,
    bias: Float[Tensor, " O"] | None,
    module: str,
    routes: tuple[Route, ...],
    scales: tuple[float, ...],
    *factors: Float[Tensor, ...],
) -> Float[Tensor, "T O"]:
    """Returns the layer's output without a gradient, in PEFT's own precision.

    PEFT multiplies by the factors in fp32. Scores and answers do the same, so that a saved adapter
    reproduces what its run recorded: with factors in bf16, losses of single examples differed by
    0.5 % (one standard deviation, SmolLM2-135M, measured).
    """
    out = frozen_linear(x, weight, bias)
    for route, scale, a, b in zip(routes, scales, factors[::2], factors[1::2], strict=True):
        rows = slice(route.start, route.stop)
        kept = _mask(route, module).drop(x[rows])
        add_update(out[rows], kept, a, b, scale=scale * _inverse_keep(route))
    return out


def routed_product(x: Float[Tensor, "T I"], *rest: Any) -> Float[Tensor, "T O"]:
    """Returns the layer's output, one run after another; the arguments are ``_RoutedProduct``'s."""
    out: Tensor = _RoutedProduct.apply(x, *rest)  # type: ignore[no-untyped-call]
    return out


class _RoutedProduct(torch.autograd.Function):
    """The layer's arithmetic with a hand-written gradient.

    Saves only the shared input and the r-wide product of each run. PEFT stores the factors in fp32;
    they are used in the dtype of the activations, as with autocast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "T I"],
        weight: Weight,
        bias: Float[Tensor, " O"] | None,
        module: str,
        routes: tuple[Route, ...],
        scales: tuple[float, ...],
        *factors: Float[Tensor, ...],
    ) -> Float[Tensor, "T O"]:
        out = frozen_linear(x, weight, bias)
        narrow = []
        for route, scale, a, b in zip(routes, scales, factors[::2], factors[1::2], strict=True):
            rows = slice(route.start, route.stop)
            z = _mask(route, module).drop(x[rows]) @ a.to(x.dtype).T
            out[rows].addmm_(z, b.to(x.dtype).T, alpha=scale * _inverse_keep(route))
            narrow.append(z)
        ctx.module, ctx.routes, ctx.scales, ctx.weight = module, routes, scales, weight
        # A layer without an adapter of any run in the row needs only its weight.
        ctx.save_for_backward(*((x, *factors, *narrow) if routes else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        count, saved = len(ctx.routes), ctx.saved_tensors
        factors, narrow = saved[1 : 1 + 2 * count], saved[1 + 2 * count :]
        grad_x = grad @ whole(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_factors: list[Tensor] = []
        for route, scale, a, b, z in zip(
            ctx.routes, ctx.scales, factors[::2], factors[1::2], narrow, strict=True
        ):
            grad_factors += _factor_grads(
                ctx.module, route, scale * _inverse_keep(route), saved[0], grad, grad_x, a, b, z
            )
        return (grad_x, None, None, None, None, None, *grad_factors)


def _factor_grads(
    module: str,
    route: Route,
    scale: float,
    x: Float[Tensor, "T I"],
    grad: Float[Tensor, "T O"],
    grad_x: Float[Tensor, "T I"] | None,
    a: Float[Tensor, "r I"],
    b: Float[Tensor, "O r"],
    z: Float[Tensor, "t r"],
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of A and B of one run, and adds its share to ``grad_x`` in place."""
    rows = slice(route.start, route.stop)
    grad_out = grad[rows]
    grad_z = (grad_out @ b.to(grad_out.dtype)).mul_(scale)
    mask = _mask(route, module)
    if grad_x is not None:
        mask.add_dropped(grad_x[rows], grad_z @ a.to(grad_out.dtype))
    grad_a = (grad_z.T @ mask.drop(x[rows])).to(a.dtype)
    grad_b = (grad_out.T @ z).to(b.dtype).mul_(scale)
    return grad_a, grad_b


def _inverse_keep(route: Route) -> float:
    return route.dropout.scale if route.dropout else 1.0


def _mask(route: Route, module: str) -> Mask:
    return Mask(() if route.dropout is None else (route.dropout,), module)


def install_routed_layers(config: LoraConfig) -> LoraConfig:
    """Makes PEFT build RoutedLinear in place of its linear layer; returns ``config``."""
    config._register_custom_module({nn.Linear: RoutedLinear, Conv1D: RoutedLinear})
    return config


def connect_router(model: nn.Module, *, router: Router, prefix: str) -> None:
    """Sets the router and the name, without ``prefix``, of every adapted layer of ``model``.

    The name determines the layer's dropout, so it must be the placement's name of the module, not
    PEFT's, which depends on how the model is wrapped.
    """
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            module.router = router
            module.module_name = name.removeprefix(prefix)
