"""Checks of this machine: packages, device, memory, cache, access to models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.engine.device import (
    choose_device,
    choose_dtype,
    cpu_multiplies_bf16,
    dtype_name,
    keep_large_blocks,
)
from loracle.engine.environment import capture_environment
from loracle.errors import SourceError
from loracle.runner.tracking import has_key
from loracle.sources import cache_folder
from loracle.text import GIB

State = Literal["ok", "limited", "missing"]

# measured (2026-11-23): the wheel, the converted model and the demo's data, with room to work
_DEMO_DISK_GIB = 1.5
# measured (LOG.md): the demo's resident set
_DEMO_MEMORY_GIB = 8.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    detail: str


def checkup() -> list[Finding]:
    """Returns the results of all checks, which use no network."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device=device)
    environment = capture_environment(device=str(device), dtype=dtype_name(dtype))
    return [
        _versions(environment),
        _cpu(environment),
        *_gpus(environment),
        Finding("dtype", "ok", f"auto means {dtype_name(dtype)} on {device}"),
        _speed(),
        _memory(environment),
        _allocator(),
        _cache(),
        _hub(),
        _wandb(),
        _optional(),
    ]


def doctor_view(findings: Sequence[Finding]) -> RenderableType:
    """Returns the findings as a table for the terminal."""
    colours = {"ok": "green", "limited": "yellow", "missing": "red"}
    table = Table(box=None, pad_edge=False, title="This machine", title_justify="left")
    for column in ("", "", ""):
        table.add_column(column)
    for finding in findings:
        colour = colours[finding.state]
        table.add_row(finding.name, Text(finding.state, style=colour), finding.detail)
    return table


def calibrate_device(console: Console) -> None:
    """Measures the device's speed and stores it for forecasts."""
    from loracle.forecast.calibration import calibrate, write_calibration

    write_calibration(calibrate(say=lambda part: console.print(f"measuring {part}")))


def _speed() -> Finding:
    from loracle.forecast.calibration import read_calibration
    from loracle.forecast.devices import this_device

    device = choose_device("auto")
    dtype = dtype_name(choose_dtype("auto", device=device))
    speed = read_calibration(this_device(), dtype=dtype)
    if speed is None:
        return Finding("speed", "limited", "not measured; run loracle doctor --calibrate")
    return Finding(
        "speed",
        "ok",
        f"{speed.flop_per_s / 1e12:.2f} TFLOP/s in {speed.dtype}, {speed.byte_per_s / 1e9:.0f} "
        f"GB/s, {speed.overhead_s * 1e6:.1f} us a call, measured {speed.measured_at}",
    )


def _versions(environment: Mapping[str, Any]) -> Finding:
    versions = {"python": environment["python"], **environment["versions"]}
    absent = [name for name, version in versions.items() if version is None]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if absent:
        return Finding("packages", "missing", f"{', '.join(absent)} not installed; found {named}")
    return Finding("packages", "ok", named)


def _cpu(environment: Mapping[str, Any]) -> Finding:
    threads = environment["torch_settings"]["num_threads"]
    name = f"{environment['cpu']['model']}, {threads} threads"
    if cpu_multiplies_bf16():
        return Finding("CPU", "ok", f"{name}, multiplies bf16")
    return Finding("CPU", "limited", f"{name}; no bf16 instructions, so runs use float32 here")


def _gpus(environment: Mapping[str, Any]) -> list[Finding]:
    gpus = environment["gpus"]
    if not gpus:
        note = "none; the CPU trains models up to about 1B parameters, 7B needs a GPU"
        return [Finding("GPU", "limited", note)]
    return [Finding("GPU", "ok", f"{gpu['name']}, {gpu['memory_gib']:.0f} GiB") for gpu in gpus]


def _memory(environment: Mapping[str, Any]) -> Finding:
    gib = environment["memory_gib"]
    state: State = "ok" if gib >= _DEMO_MEMORY_GIB else "limited"
    return Finding("memory", state, f"{gib:.0f} GiB (the demo needs about {_DEMO_MEMORY_GIB:.0f})")


def _allocator() -> Finding:
    if keep_large_blocks():
        return Finding("allocator", "ok", "glibc keeps large blocks")
    return Finding("allocator", "limited", "not glibc; large temporaries cost page faults")


def _cache() -> Finding:
    try:
        folder = cache_folder()
    except SourceError as error:
        return Finding("cache", "missing", str(error))
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    shown = "$LORACLE_CACHE" if os.environ.get("LORACLE_CACHE") else "~/.cache/loracle"
    if not os.access(existing, os.W_OK):
        return Finding("cache", "missing", f"{shown} is not writable; set LORACLE_CACHE")
    state: State = "ok" if free_gib >= _DEMO_DISK_GIB else "limited"
    return Finding(
        "cache", state, f"{shown}, {free_gib:.0f} GiB free (the demo needs {_DEMO_DISK_GIB} GiB)"
    )


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("model hub", "limited", "HF_HUB_OFFLINE is set: cached models only")
    if get_token():
        return Finding("model hub", "ok", "a token is present")
    return Finding("model hub", "limited", "no token: gated models such as llama-2-7b need one")


def _wandb() -> Finding:
    if has_key():
        return Finding("W&B", "ok", "a key is present: tracking.mode auto means online")
    return Finding("W&B", "limited", "no key: tracking.mode auto means offline")


def _optional() -> Finding:
    from importlib.util import find_spec

    if find_spec("bitsandbytes"):
        return Finding("4-bit", "ok", "bitsandbytes is installed")
    return Finding("4-bit", "limited", "bitsandbytes is not installed; pip install bitsandbytes")
