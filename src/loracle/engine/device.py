"""The device and dtype of a run, and process-wide settings of the allocator and fp32 products."""

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
    """Returns the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means on this machine.

    Raises:
        ConfigError: If that GPU does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ConfigError(
            f"device: '{device}' is not available ({count} CUDA devices); use auto or cpu"
        )
    return chosen


def choose_dtype(dtype: str, *, device: torch.device) -> torch.dtype:
    """Returns the named dtype, or the one that ``auto`` means on ``device``.

    bf16 where the hardware multiplies it, because it has fp32's range; fp16 on other GPUs; fp32 on
    other CPUs, where PyTorch would emulate bf16 many times slower.
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
    """Makes glibc reuse large blocks instead of returning them; returns True if it succeeded.

    By default glibc returns every temporary of more than 32 MB to the kernel, and the page faults
    of allocating it again cost more than the arithmetic on it (measured, LOG.md). With this setting
    the resident set never shrinks, so its peak is a high-water mark.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    mmap_set = libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    trim_set = libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mmap_set and trim_set)


@contextmanager
def faster_fp32(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Multiplies fp32 matrices with oneDNN inside the block, unless it would round to bf16 here.

    PyTorch's x86 builds multiply fp32 with MKL, which reached half the speed of oneDNN on an AMD
    EPYC (measured, LOG.md). The switch to oneDNN also permits rounding the inputs to bf16, as CPUs
    with AMX do; a test product detects this, and the switch is then undone.

    Yields:
        ``onednn``, or ``default`` where nothing was switched.
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
    """Returns glibc's free blocks to the kernel; True if there were any.

    Called at the start of a phase, so that its peak resident set excludes what earlier phases left
    with the allocator (keep_large_blocks).
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    return bool(hasattr(libc, "malloc_trim") and libc.malloc_trim(0))


def synchronize(device: torch.device) -> None:
    """Waits until ``device`` has finished its queued work, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
