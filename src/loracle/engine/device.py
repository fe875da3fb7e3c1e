"""Where a run computes, in which dtype, and how that machine is asked to behave."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loracle.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Names from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def choose_device(device: str) -> torch.device:
    """Returns the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    Raises:
        ConfigError: If it names a GPU that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ConfigError(f"device: '{device}' is not here ({count} CUDA devices); use auto or cpu")
    return chosen


def choose_dtype(dtype: str, *, device: torch.device) -> torch.dtype:
    """Returns the dtype that ``auto`` means on ``device``, or the one that is named.

    bf16 where the hardware multiplies it, because it keeps fp32's range; fp16 on GPUs without it;
    fp32 on CPUs without it, where PyTorch would emulate it many times slower.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Returns True if this CPU has bf16 instructions (AVX512-BF16 or AMX)."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def keep_large_blocks() -> bool:
    """Tells glibc to reuse large blocks instead of returning them; True if it was told.

    By default glibc gives every temporary of more than 32 MB back to the kernel, and the page
    faults of getting it again cost more than the arithmetic on it (measured, LOG.md). Afterwards
    the resident set never shrinks, so a peak is a high-water mark, which is what we report.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    mmap_told = libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    trim_told = libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mmap_told and trim_told)


@contextmanager
def faster_fp32(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Multiplies fp32 matrices with oneDNN inside the block, if that is still fp32 here.

    PyTorch's x86 builds multiply fp32 with MKL, which does not use all of other makers' CPUs: half
    the speed of oneDNN was measured on an AMD EPYC (LOG.md). The switch that chooses oneDNN also
    allows it to round the inputs to bf16, which CPUs with AMX would do; so a product that tells
    the two apart decides, and where it comes out rounded the switch is taken back.

    Yields:
        What multiplies: ``onednn``, or ``default`` where nothing was switched.
    """
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        yield "default"
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        exact = multiplies_in_fp32()
        if not exact:
            torch.set_float32_matmul_precision(before)
        yield "onednn" if exact else "default"
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_in_fp32() -> bool:
    """Returns True if fp32 products keep more of their inputs than bf16 or TF32 would.

    576 times 1 + 2^-11 is 576.28125, and 576 if the inputs are rounded to fewer than 11 bits.
    """
    left = torch.full((64, 576), 1.0 + 2.0**-11)
    right = torch.ones(576, 192)
    products = (left @ right, left @ right.T.contiguous().T, right.T @ left.T)
    return all(bool((product == 576.28125).all()) for product in products)


def release_free_memory() -> bool:
    """Returns the blocks that glibc keeps for later to the kernel; True if there were any.

    Called where a phase begins, so that its peak resident set is its own and not what an earlier
    phase left behind (keep_large_blocks).
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    return bool(hasattr(libc, "malloc_trim") and libc.malloc_trim(0))


def synchronize(device: torch.device) -> None:
    """Waits until ``device`` has done what it was given; a clock read before that is wrong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
