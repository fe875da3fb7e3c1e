"""Devices: memory, rate of 16-bit products, memory bandwidth.

Rates are the vendors' figures for dense products with fp32 accumulation, without sparsity, and the
fraction of them that a step's products are taken to reach where the device is not calibrated.

Sources: NVIDIA data sheets "T4 Tensor Core GPU" (2019), "L4 Tensor Core GPU" (2023), "A100 Tensor
Core GPU" (SXM, 2021), "H100 Tensor Core GPU" (SXM, 2023), "H200 Tensor Core GPU" (SXM, 2024), "Ada
GPU Architecture" (RTX 4090, 2022). Memory is what ``nvidia-smi`` reports, modal-labs/modal-client
pull request 2797 (T4, L4, A100, H100); of the others, the nominal size.

Fractions: the T4 gives 24 TFLOP/s over many products of 4096 x 4096, held back by its 70 W
(forums.developer.nvidia.com, thread 264462). The best shape reaches 271 TFLOP/s on an A100 SXM and
795 on an H100 SXM (stas00/ml-engineering, table of maximum achievable matmul FLOPS, 2025); assumed:
the shapes of a step reach 0.8 of that. Nothing was found for the others: 0.6 is assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from loracle.errors import UsageError, did_you_mean
from loracle.text import GIB

_MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU, or this machine's CPU."""

    name: str
    """Name as ``--gpu`` takes it, or as the device reports it."""
    memory_gib: float
    """Total memory, before driver and context."""
    has_bf16: bool
    """False: fp16 with loss scaling on a GPU, fp32 on a CPU."""
    tflop_per_s: float | None = None
    """Rate of dense 16-bit products; None: unknown."""
    gbyte_per_s: float | None = None
    """Memory bandwidth, 1e9 bytes per second; None: unknown."""
    reached_frac: float = 0.6
    """Fraction of the rate that a step's products are taken to reach."""
    is_gpu: bool = True
    """False: a CPU."""
    says: str = ""
    """Part of the name that PyTorch reports; empty: not in the table."""


def _device(
    name: str, mib: int, tflops: float, reached: float, bandwidth: float, says: str
) -> Device:
    has_bf16 = name != "t4"
    return Device(name, mib / _MIB_PER_GIB, has_bf16, tflops, bandwidth, reached, says=says)


DEVICES = {
    device.name: device
    for device in (
        _device("t4", 15360, 65.0, 0.37, 320.0, "T4"),
        _device("l4", 23034, 121.0, 0.6, 300.0, "L4"),
        _device("rtx4090", 24564, 165.2, 0.6, 1008.0, "RTX 4090"),
        _device("a100-40", 40960, 312.0, 0.7, 1555.0, "A100"),
        _device("a100-80", 81920, 312.0, 0.7, 2039.0, "A100"),
        _device("h100", 81559, 989.4, 0.64, 3350.0, "H100"),
        _device("h200", 143771, 989.4, 0.64, 4800.0, "H200"),
    )
}
"""The table, by name."""

# assumed: largest relative difference between a card's reported memory and the table's
_SAME_MEMORY_FRAC = 0.1


def device_of(given: str) -> Device:
    """Returns a device of the table, or one of a given size of memory.

    Args:
        given: A name, or a size in GiB such as ``24GiB`` or ``24``.

    Raises:
        UsageError: If it is neither.
    """
    if device := DEVICES.get(given.lower()):
        return device
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gib|gb|g)?", given.strip(), flags=re.IGNORECASE)
    if size is None or float(size[1]) <= 0:
        matches = [name for name in DEVICES if name.startswith(given.lower())] if given else []
        hint = f"; did you mean '{matches[0]}'?" if matches else did_you_mean(given, DEVICES)
        raise UsageError(
            f"--gpu: no device '{given}' (known: {', '.join(DEVICES)}; or its memory, e.g. "
            f"24GiB){hint}"
        )
    return Device(f"{float(size[1]):g} GiB", float(size[1]), has_bf16=True)


def like_this(name: str, *, memory_gib: float) -> Device | None:
    """Returns the device of the table that PyTorch's name of a GPU means; None if there is none."""
    words = name.replace("-", " ")
    return next(
        (
            device
            for device in DEVICES.values()
            if re.search(rf"\b{re.escape(device.says)}\b", words)
            and abs(device.memory_gib - memory_gib) <= _SAME_MEMORY_FRAC * device.memory_gib
        ),
        None,
    )


def this_device() -> Device:
    """Returns the device that runs use on this machine."""
    import psutil
    import torch

    from loracle.engine.device import choose_device, cpu_multiplies_bf16
    from loracle.engine.environment import cpu_model

    device = choose_device("auto")
    if device.type != "cuda":
        memory_gib = psutil.virtual_memory().total / GIB
        return Device(cpu_model(), memory_gib, has_bf16=cpu_multiplies_bf16(), is_gpu=False)
    properties = torch.cuda.get_device_properties(device)
    memory_gib = properties.total_memory / GIB
    listed = like_this(properties.name, memory_gib=memory_gib)
    unlisted = Device(properties.name, memory_gib, has_bf16=properties.major >= 8)
    return replace(
        listed or unlisted,
        name=properties.name,
        memory_gib=memory_gib,
        has_bf16=unlisted.has_bf16,
        says="",
    )
