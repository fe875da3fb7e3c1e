"""A base in 4 bits: weights are stored packed as NF4 and unpacked for each product.

bitsandbytes packs and unpacks. Its own layer is not used for computing: on a CPU it rewrites its
weights in place at the first pass without a gradient, and RoutedLinear needs the weight and not the
product. Unpacked weights exist for one product, in the forward pass and again in the backward pass.
A few tokens on a GPU, as decoding has them, go through bitsandbytes' product of packed weights, as
they do in a model that is deployed.

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


FUSED_ROWS = 256
"""Most rows that a GPU multiplies by packed weights, which moves 0.5 bytes a weight and not 4.5.

source: bitsandbytes 0.50.2 backends/cuda/ops.py, measured by its makers: by card and shape the
fused product is the faster one up to 8 to 256 rows. Below, bitsandbytes chooses; above, unpacking.
"""


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a linear layer in 4 bits."""

    packed: Tensor
    """uint8, two values each."""
    state: Any
    """bitsandbytes' ``QuantState``: shape, block scales, and the packing of these scales."""

    def whole(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """Returns the weight, unpacked."""
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(self.packed, self.state)
        return unpacked.to(dtype)

    def product(
        self, x: Float[Tensor, "*T I"], bias: Float[Tensor, " O"] | None
    ) -> Float[Tensor, "*T O"]:
        """Returns the product, never unpacked as a whole; without a gradient."""
        from bitsandbytes import matmul_4bit

        out: Tensor = matmul_4bit(x, self.packed.t(), quant_state=self.state, bias=bias)
        return out

    def is_fused(self, x: Float[Tensor, "*T I"]) -> bool:
        """Returns True if ``x`` is multiplied by the packed weight: few tokens decoded on a GPU.

        Scores, which are not computed in inference mode, do not depend on the size of a pass.
        """
        size = x.shape[-1]
        few = 0 < x.numel() <= FUSED_ROWS * size and size % self.state.blocksize == 0
        return few and x.device.type == "cuda" and torch.is_inference_mode_enabled()

    def parts(self) -> Iterator[Tensor]:
        """Yields every tensor of the packed weight."""
        yield self.packed
        for state in (self.state, self.state.state2):
            if state is not None:
                yield from (state.absmax, state.code)
        if self.state.offset is not None:
            yield self.state.offset


Weight = Tensor | PackedWeight
"""Weight of a frozen linear layer, (O, I) when unpacked."""


def weight_of(layer: nn.Module) -> Weight:
    """Returns the weight of ``nn.Linear``, ``Conv1D`` or a layer in 4 bits, as (O, I)."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return PackedWeight(weight.data, state)
    stored: Tensor = weight
    return stored.T if isinstance(layer, Conv1D) else stored


def whole(weight: Weight, dtype: torch.dtype) -> Float[Tensor, "O I"]:
    """Returns the weight to multiply by, unpacked if it is packed."""
    return weight if isinstance(weight, Tensor) else weight.whole(dtype)


def num_numbers(parameter: Tensor) -> int:
    """Returns the number of values of a parameter, packed or not."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def four_bit_config(dtype: torch.dtype) -> Any:
    """Returns the Transformers configuration that packs every linear layer but the head.

    Products and unpacked weights are in ``dtype``.

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
    """Makes every layer in 4 bits multiply by its unpacked weight; returns their number."""
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
    """Returns the product of a frozen layer, its weight unpacked if necessary."""
    bias = bias if bias is None else bias.to(x.dtype)
    if isinstance(weight, PackedWeight) and weight.is_fused(x):
        return weight.product(x, bias)
    return nn.functional.linear(x, whole(weight, x.dtype), bias)


class _FrozenProduct(torch.autograd.Function):
    """Product with a frozen weight, which is unpacked again for the gradient."""

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
