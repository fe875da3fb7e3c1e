"""Dropout in one pass, and an adapter's narrow products without writing what is dropped.

Where a C compiler is found, a CPU drops in one pass; a CUDA device with Triton also multiplies by
an adapter's factors that way. Both are compared with plain arithmetic at first use; where they
cannot be built or differ, plain PyTorch is used, and a warning says that they differ.

Shapes: T tokens, I features of what is dropped, N features of an update, R rank.
"""

from __future__ import annotations

import subprocess
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from loracle.model.faults import first_line, is_out_of_memory
from loracle.model.layers import adapter_ops, compiled
from loracle.model.layers.dropout import (
    DropoutStream,
    keep_bits,
    module_key,
    threshold_of,
    token_keys,
    token_thresholds,
    zero_dropped,
    zero_dropped_,
)
from loracle.model.layers.ops import has_kernels

_LARGEST_RANK = 256
# assumed: more than the rounding of a product that is right, less than the error of a wrong one
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# The operators that `adapter_ops` registers.
_OURS = torch.ops.loracle
assert adapter_ops.LIBRARY is not None


class Mask:
    """The dropout mask of a module's input, by the streams of its tokens; made where it is used."""

    def __init__(self, streams: tuple[DropoutStream, ...], module: str) -> None:
        self.streams = streams
        """Empty: nothing is dropped."""
        self.module = module
        self._bits: Tensor | None = None

    def drop(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T I"]:
        """Returns ``x`` with zeros where it is dropped; the kept numbers keep their bits."""
        if not self.streams:
            return x
        if drops_in_one_pass(x):
            result: Tensor = _OURS.drop(x, *self.drawn(x.device))
            return result
        return zero_dropped(x, self._bits_of(x))

    def add_dropped(self, out: Float[Tensor, "T I"], update: Float[Tensor, "T I"]) -> None:
        """Adds what is left of ``update`` to ``out``; may overwrite ``update``."""
        if not self.streams:
            out += update
        elif drops_in_one_pass(out):
            _OURS.add_dropped(out, update, *self.drawn(out.device))
        else:
            out += zero_dropped_(update, self._bits_of(update))

    def drawn(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, int]:
        """Returns keys and thresholds of the tokens, and what the module adds to the keys."""
        if not self.streams:
            return None, None, 0
        keys, thresholds = (made(self.streams, device) for made in (token_keys, token_thresholds))
        return keys, thresholds, module_key(self.module)

    def _bits_of(self, x: Tensor) -> Tensor:
        if self._bits is None:
            self._bits = keep_bits(
                self.streams, module=self.module, features=x.shape[1], device=x.device
            )
        return self._bits


NOTHING_DROPPED = Mask((), "")


def narrow(
    x: Float[Tensor, "T I"],
    factor: Float[Tensor, "R I"],
    *,
    mask: Mask = NOTHING_DROPPED,
    scale: Float[Tensor, " R"] | None = None,
    bounds: Int32[Tensor, "T 2"] | None = None,
) -> Float[Tensor, "T R"]:
    """Returns ``drop(x) factor^T``, its columns scaled, zero outside a token's ``bounds``."""
    result: Tensor = _OURS.narrow(x, factor, *mask.drawn(x.device), scale, bounds)
    return result


def widen_(
    out: Float[Tensor, "T N"],
    z: Float[Tensor, "T R"],
    factor: Float[Tensor, "R N"],
    *,
    mask: Mask = NOTHING_DROPPED,
    scale: Float[Tensor, " R"] | None = None,
) -> None:
    """Adds ``drop(z factor)`` to ``out``, the rows of ``factor`` scaled."""
    _OURS.widen(out, z, factor, *mask.drawn(out.device), scale)


def outer(
    z: Float[Tensor, "T R"],
    y: Float[Tensor, "T N"],
    *,
    mask: Mask = NOTHING_DROPPED,
    scale: Float[Tensor, " R"] | None = None,
    by_feature: bool = False,
) -> Float[Tensor, "M L"]:
    """Returns ``scale z^T drop(y)`` in fp32, (R, N), or (N, R) if ``by_feature``."""
    result: Tensor = _OURS.outer(z, y, *mask.drawn(y.device), scale, by_feature)
    return result


def drops_in_one_pass(x: Tensor) -> bool:
    """Returns whether numbers like ``x`` are dropped by a kernel of ours on their device."""
    if x.device.type == "cpu":
        return compiled.library() is not None
    return multiplies_in_one_pass(x, rank=1)


def multiplies_in_one_pass(x: Tensor, *, rank: int) -> bool:
    """Returns whether ``x`` is multiplied by factors of a rank in kernels of ours."""
    if rank > _LARGEST_RANK or x.dtype not in _TOLERANCES or not has_kernels(x.device):
        return False
    if x.is_meta:
        return True
    padded = max(16, 1 << (rank - 1).bit_length())
    return _is_right(x.device, x.dtype, rank=padded, is_aligned=x.shape[1] % 16 == 0)


_CHECKED = (
    DropoutStream(threshold_of(0.1), seed=0, step=0, slots=(0, 2), lengths=(40, 29)),
    DropoutStream(threshold_of(0.5), seed=1, step=3, slots=(1,), lengths=(64,)),
)


@lru_cache(maxsize=64)
def _is_right(device: torch.device, dtype: torch.dtype, *, rank: int, is_aligned: bool) -> bool:
    """Compares the kernels for such numbers with plain PyTorch on the CPU, once per process."""
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if find_spec("triton") is None or (dtype == torch.bfloat16 and not has_bf16):
        return False
    features = 512 if is_aligned else 509
    try:
        fault = _fault(device, dtype, rank=rank, features=features)
    except _build_errors() as error:
        if is_out_of_memory(error):
            raise
        fault = f"cannot be built: {first_line(error)}"
    if fault is not None:
        warnings.warn(
            f"{device}: our kernels of {dtype} and rank {rank} are not used, PyTorch's are; "
            f"ours {fault}",
            RuntimeWarning,
            stacklevel=2,
        )
    return fault is None


def _build_errors() -> tuple[type[Exception], ...]:
    from triton.errors import TritonError  # type: ignore[import-not-found]

    return RuntimeError, OSError, ImportError, subprocess.SubprocessError, TritonError


def _fault(device: torch.device, dtype: torch.dtype, *, rank: int, features: int) -> str | None:
    """Returns what is wrong with the kernels; None if nothing is."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(sum(stream.lengths) for stream in _CHECKED)
    x, y = (torch.randn(tokens, features, generator=draw).to(dtype) for _ in range(2))
    factor = torch.randn(rank, features, generator=draw)
    scale = torch.rand(rank, generator=draw) + 1
    bounds = torch.tensor([[0, rank // 2]] * 69 + [[rank // 2, rank]] * 64, dtype=torch.int32)
    there = [tensor.to(device) for tensor in (x, y, factor, scale, bounds)]
    kept = keep_bits(_CHECKED, module="m", features=features, device=x.device).bool()
    mask = Mask(_CHECKED, "m")
    if not torch.equal(_OURS.drop(there[0], *mask.drawn(device)), (x * kept).to(device)):
        return "differ in their masks"
    columns, exact, masked = torch.arange(rank), factor.double(), (x * kept).double()
    own = (columns >= bounds[:, :1]) & (columns < bounds[:, 1:])
    narrowed = own * scale * (masked @ exact.T)
    given = narrowed.to(device, dtype)
    out = there[1].clone()
    widen_(out, given, there[2], mask=mask, scale=there[3])
    results = {
        "A": (narrow(there[0], there[2], mask=mask, scale=there[3], bounds=there[4]), narrowed),
        "B": (out, y.double() + kept * (narrowed @ (scale[:, None] * exact))),
        "gradient": (
            outer(given, there[0], mask=mask, scale=there[3], by_feature=True),
            masked.T @ narrowed * scale,
        ),
    }
    for name, (got, expected) in results.items():
        within = _TOLERANCES[dtype] * float(expected.abs().max())
        if not torch.allclose(got.double(), expected.to(device), rtol=0, atol=within):
            return f"differ in the product with {name}"
    return None
