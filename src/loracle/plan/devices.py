"""What a GPU offers: memory, the rate of 16-bit products, bandwidth.

Rates are the makers' figures for dense products with fp32 accumulation, without sparsity. What a
step reaches of them is a matter of calibration, not of this table.

Sources: NVIDIA data sheets "T4 Tensor Core GPU" (2019), "L4 Tensor Core GPU" (2023), "A100 Tensor
Core GPU" (SXM, 2021), "H100 Tensor Core GPU" (SXM, 2023), "H200 Tensor Core GPU" (SXM, 2024), "Ada
GPU Architecture" (RTX 4090, 2022). Memory is what ``nvidia-smi`` reports, modal-labs/modal-client
pull request 2797 (T4, L4, A100, H100); of the others, the nominal size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loracle.errors import UsageError, did_you_mean

_MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU."""

    name: str
    """As ``--gpu`` takes it."""
    memory_gib: float
    """In all, before the driver and the context take theirs."""
    has_bf16: bool
    """False: fp16 with loss scaling."""
    tflop_per_s: float | None
    """Dense 16-bit products; None: not known, so no times are predicted."""
    gbyte_per_s: float | None
    """Memory bandwidth, 1e9 bytes per second."""


def _device(name: str, mib: int, bf16: bool, tflops: float, bandwidth: float) -> Device:
    return Device(name, mib / _MIB_PER_GIB, bf16, tflops, bandwidth)


DEVICES = {
    device.name: device
    for device in (
        _device("t4", 15360, False, 65.0, 320.0),
        _device("l4", 23034, True, 121.0, 300.0),
        _device("rtx4090", 24564, True, 165.2, 1008.0),
        _device("a100-40", 40960, True, 312.0, 1555.0),
        _device("a100-80", 81920, True, 312.0, 2039.0),
        _device("h100", 81559, True, 989.4, 3350.0),
        _device("h200", 143771, True, 989.4, 4800.0),
    )
}
"""By name."""


def device_of(given: str) -> Device:
    """Returns a device of the table, or one that is known by its memory alone.

    Args:
        given: A name, or a size such as ``24GiB`` or ``24``, in GiB.

    Raises:
        UsageError: If it is neither.
    """
    known = DEVICES.get(given.lower())
    if known is not None:
        return known
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gib|gb|g)?", given.strip(), flags=re.IGNORECASE)
    if size is None or float(size[1]) <= 0:
        raise UsageError(
            f"--gpu: no device '{given}' (known: {', '.join(DEVICES)}; or its memory, e.g. 24GiB)"
            f"{did_you_mean(given, DEVICES)}"
        )
    return Device(f"{float(size[1]):g} GiB", float(size[1]), True, None, None)
