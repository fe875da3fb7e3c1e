"""A base in 4 bits: weights are kept packed as NF4 and unpacked for each product.

bitsandbytes packs and unpacks. Its own layer is not used for computing: on a CPU it rewrites its
weights in place when it first answers without a gradient, and a LoRA layer of ours needs the weight
and not the product. Unpacked weights live for one product, in the forward pass and again in the
backward pass, so that no whole weight is ever kept.

Shapes: T tokens in the row, I input and O output features.
Source: Dettmers et al. 2023 arXiv:2305.14314 section 3, NF4 with double quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from loracle.errors import ModelError

NF4 = "nf4"


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a linear layer in 4 bits."""

    packed: Tensor
    """uint8, two numbers each."""
    state: Any
    """bitsandbytes' ``QuantState``: shape, block scales, and how they are packed themselves."""

    def whole(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """Returns the weight, unpacked."""
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(self.packed, self.state)
        return unpacked.to(dtype)

    def parts(self) -> Iterator[Tensor]:
        """Yields every tensor that the weight is made of."""
        yield self.packed
        for state in (self.state, self.state.state2):
            if state is not None:
                yield from (state.absmax, state.code)
        if self.state.offset is not None:
            yield self.state.offset


Weight = Tensor | PackedWeight
"""Of a frozen linear layer, (O, I) once it is whole."""


def weight_of(layer: nn.Module) -> Weight:
    """Returns the weight of ``nn.Linear``, ``Conv1D`` or a layer in 4 bits, as (O, I)."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return PackedWeight(weight.data, state)
    stored: Tensor = weight
    return stored.T if isinstance(layer, Conv1D) else stored


def whole(weight: Weight, dtype: torch.dtype) -> Float[Tensor, "O I"]:
    """Returns the weight to multiply by: the one that is kept, or an unpacked one."""
    return weight if isinstance(weight, Tensor) else weight.whole(dtype)


def num_numbers(parameter: Tensor) -> int:
    """Returns how many numbers a parameter stands for, packed or not."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def four_bit_config(dtype: torch.dtype) -> Any:
    """Returns the Transformers configuration that packs every linear layer but the head.

    Args:
        dtype: Of products and unpacked weights.

    Raises:
        ModelError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "quantization: nf4 needs bitsandbytes, which is not installed; pip install "
            "bitsandbytes, or set quantization=null"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def install_unpacked_products(model: nn.Module) -> int:
    """Lets every layer in 4 bits multiply by its unpacked weight; returns how many there are."""
    packed = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and isinstance(weight_of(module), PackedWeight)
    ]
    for module in packed:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    return len(packed)


def _forward(layer: nn.Module, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
    weight, bias = weight_of(layer), getattr(layer, "bias", None)
    if not torch.is_grad_enabled():
        return frozen_linear(x, weight, bias)
    out: Tensor = _FrozenProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def frozen_linear(
    x: Float[Tensor, "*T I"], weight: Weight, bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "*T O"]:
    """Returns the layer's product."""
    bias = bias if bias is None else bias.to(x.dtype)
    return nn.functional.linear(x, whole(weight, x.dtype), bias)


class _FrozenProduct(torch.autograd.Function):
    """The product of a frozen weight, which is unpacked again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*T I"], weight: Weight, bias: Float[Tensor, " O"] | None
    ) -> Float[Tensor, "*T O"]:
        ctx.weight = weight
        return frozen_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0] @ whole(ctx.weight, grads[0].dtype), None, None
