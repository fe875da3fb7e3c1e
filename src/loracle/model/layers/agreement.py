"""Decides by numbers whether a replacement computes what stock code does.

The same random input goes through both, on the device and in the dtype in which they will be used,
and so does a random gradient. Roundings may differ where the last bits of fp32 do; another formula,
or the same one rounded at other places, differs far more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from loracle.model.faults import first_line, is_out_of_memory

Notice = Callable[[str], None]
"""Takes one line for a person."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# assumed: of 16-bit results, at most this share may round to the other neighbour
_SHARE_ROUNDED_OTHERWISE = 0.005
# Largest relative error of a whole gradient, and of any result in wider dtypes.
_RELATIVE_ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_RELATIVE_ERROR_WIDE = 1e-5


def say_nothing(_line: str) -> None:
    """Drops a notice."""


def disagreement(candidate: Function, stock: Function, inputs: Sequence[Tensor]) -> str | None:
    """Returns how two differentiable functions of tensors differ; None if they compute the same.

    Those that cannot run here, because a compiler fails for instance, differ.
    """
    try:
        expected, found = (_outcome(function, inputs) for function in (stock, candidate))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"cannot run here ({first_line(error)})"
    outputs = len(expected) - len(inputs)
    for place, (mine, other) in enumerate(zip(found, expected, strict=True)):
        if mine.shape != other.shape or mine.dtype != other.dtype:
            return "returns another shape or dtype"
        if not (_rounds_alike(mine, other) if place < outputs else _is_near(mine, other)):
            return "gives other numbers" if place < outputs else "gives another gradient"
    return None


@contextmanager
def real_numbers() -> Iterator[None]:
    """Lets tensors on the CPU hold numbers inside the block, while a forecast's have none."""
    with torch._C.DisableTorchFunction():
        yield


def drawn(*shape: int, like: Tensor, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Returns normal random numbers with the device and dtype of ``like``."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, generator=draw, device="cpu") * scale
    return numbers.to(like.device, like.dtype)


def _outcome(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs, then the gradients of the inputs for random ones of the outputs."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        result = function(*leaves)
        outputs = (result,) if isinstance(result, Tensor) else result
        grads = [drawn(*out.shape, like=out, seed=9 + i) for i, out in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, leaves, grads)
    return [*(out.detach() for out in outputs), *gradients]


def _rounds_alike(mine: Tensor, other: Tensor) -> bool:
    if mine.dtype not in _RELATIVE_ERROR:
        return _is_near(mine, other)
    return _is_near(mine, other) and bool(
        (mine != other).double().mean() <= _SHARE_ROUNDED_OTHERWISE
    )


def _is_near(mine: Tensor, other: Tensor) -> bool:
    within = _RELATIVE_ERROR.get(mine.dtype, _RELATIVE_ERROR_WIDE)
    return bool((mine.double() - other.double()).norm() <= within * other.double().norm())
