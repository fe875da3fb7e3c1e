"""The device that a forecast is for, and its speed: measured, or derived from the table."""

from __future__ import annotations

from dataclasses import dataclass

from loracle.config.run import Config
from loracle.engine.device import dtype_name
from loracle.forecast.devices import Device, device_of, this_device
from loracle.forecast.op_costs import Rates
from loracle.forecast.predict import dtype_on

# assumed, without a calibration: the fraction of the bandwidth that copies reach
_BANDWIDTH_FRAC = 0.75
# measured (2-core AMD EPYC, 2026-11-25): 0.19 s of a step's 14,752 launches on a CUDA runtime that
# does nothing; a driver adds to it, a faster core takes from it
_LAUNCH_S = 13e-6


@dataclass(frozen=True)
class Target:
    """A device and its speed."""

    device: Device
    rates: Rates | None
    """Its speed; None: unknown, so no times are predicted."""
    basis: str
    """Where the rates are from, in words."""


def target_of(gpu: str | None, *, config: Config) -> Target:
    """Returns the device that a forecast is for.

    Args:
        gpu: A name of the table or a size of memory; None: this machine's device.
        config: Its dtype decides which calibration is used.

    Raises:
        UsageError: If there is no such device.
    """
    from loracle.forecast.calibration import launch_time_s, read_calibration

    device = this_device() if gpu is None else device_of(gpu)
    dtype = dtype_on(device, requested=config.dtype)
    measured = read_calibration(device, dtype=dtype_name(dtype))
    if measured is not None:
        return Target(
            device,
            measured.rates(overlaps=device.is_gpu),
            f"measured on this machine, {measured.measured_at}",
        )
    if device.tflop_per_s is None or device.gbyte_per_s is None:
        how = (
            "measure it with: loracle doctor --calibrate"
            if gpu is None
            else "the device is not in the table"
        )
        return Target(device, None, f"speed not known; {how}")
    launch_s = _LAUNCH_S if gpu is not None else launch_time_s()
    rates = Rates(
        flop_per_s=device.reached_frac * device.tflop_per_s * 1e12,
        byte_per_s=_BANDWIDTH_FRAC * device.gbyte_per_s * 1e9,
        overhead_s=launch_s,
        overlaps=True,
    )
    return Target(
        device,
        rates,
        f"rough: {device.reached_frac:.0%} of the vendor's rate and {_BANDWIDTH_FRAC:.0%} of its "
        f"bandwidth taken, not measured; {1e6 * launch_s:.0f} us to launch a kernel, "
        f"{'as on another machine' if gpu is not None else 'measured here'}",
    )
