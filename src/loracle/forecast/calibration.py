"""Measures the speed of this device: matrix products, memory, calls, and a training step.

Everything else is one factor: measured over predicted time of a step of a small random model that
has the shape of the models that are tuned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loracle.config.files import load_config
from loracle.digest import Inputs, code_digest, key_of
from loracle.engine.device import choose_device, choose_dtype, dtype_name, synchronize
from loracle.engine.environment import torch_settings
from loracle.engine.throughput import token_rates
from loracle.errors import RunFolderError, SourceError
from loracle.forecast.devices import Device, this_device
from loracle.forecast.op_costs import Rates
from loracle.records.files import read_json, write_json
from loracle.sources.cache import cache_folder
from loracle.text import slug_of
from loracle.version import package_version

CALIBRATION_SOURCES = ("forecast/**/*.py", "model/**/*.py", "engine/**/*.py")
_SCHEMA = 1
# assumed: enough for a stable minimum, short enough to wait for
_REPEATS = 5
_STEPS = 6
_CALLS = 2000
_CHAIN = 500
_ADDED = 1 << 23

# Sizes of the random model whose step is measured, by kind of device.
_SIZES = {
    "cpu": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6},
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4},
}
_HEAD_SIZE = 64
_VOCABULARY = 8192
_BATCH = [(54, 150)] * 8


@dataclass(frozen=True)
class Calibration:
    """Measured speed of a device."""

    device: str
    """Name of the device."""
    dtype: str
    """Dtype of the products."""
    threads: int
    """PyTorch's number of CPU threads."""
    flop_per_s: float
    byte_per_s: float
    overhead_s: float
    """Seconds per call."""
    factor: float
    """Measured over predicted time of a step."""
    measured_at: str
    """ISO date."""
    torch: str
    """Version of PyTorch."""

    def rates(self, *, overlaps: bool) -> Rates:
        """Returns the rates from which times are predicted."""
        return Rates(
            self.flop_per_s, self.byte_per_s, self.overhead_s, overlaps=overlaps, factor=self.factor
        )


def calibrate(*, say: Callable[[str], None] = lambda _: None) -> Calibration:
    """Measures this machine's device for some seconds; ``say`` gets the name of each part."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device=device)
    say("products")
    flops = _products(device, dtype)
    say("memory")
    moved = _moved(device, dtype)
    say("calls")
    overhead = _overhead(device)
    say("a step")
    uncorrected = Rates(flops, moved, overhead, overlaps=device.type == "cuda")
    predicted, measured = _step(device, dtype, rates=uncorrected)
    return Calibration(
        device=this_device().name,
        dtype=dtype_name(dtype),
        threads=torch.get_num_threads(),
        flop_per_s=flops,
        byte_per_s=moved,
        overhead_s=overhead,
        factor=measured / predicted,
        measured_at=datetime.now(UTC).date().isoformat(),
        torch=str(torch.__version__),
    )


def _products(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 1024
    weight = torch.ones(size, size, dtype=dtype, device=device)
    ((_, rows_per_s),) = token_rates(weight, counts=(2048,), repeats=_REPEATS)
    return 2.0 * size * size * rows_per_s


def _moved(device: torch.device, dtype: torch.dtype) -> float:
    term = torch.ones(_ADDED, dtype=dtype, device=device)
    out = torch.empty_like(term)
    seconds = _timed(lambda: torch.add(term, term, out=out), device=device)
    return 3 * _ADDED * dtype.itemsize / seconds


def launch_time_s() -> float:
    """Returns the seconds in which this machine's processor launches a kernel of a step on its GPU.

    Forward and backward passes of small tensors: the device is done before the host.
    """
    return _launch_time_s(choose_device("auto"))


def _launch_time_s(device: torch.device) -> float:
    small = torch.ones(16, device=device, requires_grad=True)

    def chain() -> None:
        value = small
        for _ in range(_CHAIN):
            value = value * 1.0
        value.sum().backward()

    # As many multiplications backward as forward.
    return _timed(chain, device=device) / (2 * _CHAIN)


def _overhead(device: torch.device) -> float:
    if device.type == "cuda":
        return _launch_time_s(device)
    small = torch.ones(16, device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            small.add_(1.0)

    return _timed(calls, device=device) / _CALLS


def _timed(run: Callable[[], object], *, device: torch.device) -> float:
    """Returns the seconds of the fastest of a few runs, after a warm-up."""
    times = []
    for _ in range(_REPEATS + 1):
        synchronize(device)
        started_at = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started_at)
    return min(times[1:])


def _step(device: torch.device, dtype: torch.dtype, *, rates: Rates) -> tuple[float, float]:
    """Returns predicted and measured seconds of a step of a small model with random weights."""
    from loracle.forecast.meta_base import model_without_weights
    from loracle.forecast.trace import synthetic_examples, trace_step
    from loracle.model.inventory import inventory_from_architecture
    from loracle.placement import resolve_placement

    architecture = _architecture(device)
    config = load_config("base_config", overrides=["model=smollm2-135m", "train.batch_size=8"])
    plan = resolve_placement(
        "all-linear",
        inventory=inventory_from_architecture(architecture),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
    )
    examples = synthetic_examples(_BATCH)
    with model_without_weights(
        architecture, plan=plan, device=this_device(), dtype=dtype, dropout=config.lora.dropout
    ) as (base, adapter):
        traced = trace_step(base, adapter=adapter, config=config, examples=examples)
    measured = _measured_step(architecture, device, dtype, plan=plan, config=config)
    return traced.work.seconds(rates), measured


def _architecture(device: torch.device) -> dict[str, Any]:
    size = _SIZES[device.type]
    return {
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "num_attention_heads": size["hidden_size"] // _HEAD_SIZE,
        "num_key_value_heads": size["hidden_size"] // _HEAD_SIZE,
        "tie_word_embeddings": False,
        **size,
    }


def _measured_step(
    architecture: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    plan: Any,
    config: Any,
) -> float:
    from transformers import AutoModelForCausalLM

    from loracle.engine.train import train_bundle
    from loracle.engine.train_state import new_run
    from loracle.forecast.trace import synthetic_examples
    from loracle.model.adapters import attach_adapter
    from loracle.model.base import FrozenBase
    from loracle.model.inventory import transformers_config
    from loracle.model.layers.attention import PACKED
    from loracle.model.layers.fast_parts import install_fast_parts
    from loracle.model.miniature import one_word_tokenizer
    from loracle.screen import quiet_transformers

    with quiet_transformers(), device:
        model = AutoModelForCausalLM.from_config(
            transformers_config(architecture), dtype=dtype, attn_implementation=PACKED
        )
    model = model.to(device).eval().requires_grad_(False)
    install_fast_parts(model)
    base = FrozenBase(model=model, tokenizer=one_word_tokenizer(), device=device, dtype=dtype)
    adapter = attach_adapter(
        base,
        name="default",
        plan=plan,
        dropout=config.lora.dropout,
        seed=0,
        model_source="calibration",
    )
    run = new_run(
        base,
        adapter=adapter,
        examples=synthetic_examples(_BATCH),
        train=config.train.model_copy(update={"max_steps": _STEPS}),
        dropout=config.lora.dropout,
        seed=0,
    )
    steps = train_bundle(base, [run], micro_batch_tokens=config.train.micro_batch_tokens)
    times = [record.step_time_s for (record,) in steps if record is not None]
    return statistics.median(times[2:])


def write_calibration(calibration: Calibration) -> Path:
    """Stores a calibration in the cache, where forecasts read it; returns its file."""
    path = _path(calibration.device, calibration.dtype, calibration.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": _SCHEMA, **asdict(calibration)})
    return path


def read_calibration(device: Device, *, dtype: str) -> Calibration | None:
    """Returns the stored calibration of the device of that name and dtype; None without one."""
    try:
        path = _path(device.name, dtype, torch.get_num_threads())
        if not path.is_file():
            return None
        stored = read_json(path)
        return Calibration(**stored) if stored.pop("schema") == _SCHEMA else None
    except (RunFolderError, SourceError, TypeError, KeyError):
        return None


def _path(device: str, dtype: str, threads: int) -> Path:
    name = slug_of(f"{device} {dtype} {threads}-threads")
    key = calibration_key(device, dtype, threads)
    return cache_folder() / "calibration" / f"{name}-{key[:12]}.json"


def calibration_key(device: str, dtype: str, threads: int) -> str:
    """Returns the key of the measured speed of the device of that name."""
    settings = torch_settings() | {"num_threads": threads}
    sizes = {
        "sizes": _SIZES,
        "batch": _BATCH,
        "added": _ADDED,
        "calls": _CALLS,
        "chain": _CHAIN,
        "steps": _STEPS,
    }
    inputs = Inputs(
        weights=None,
        config=None,
        generation=None,
        tokenizer=None,
        dtype=dtype,
        quantization=None,
        device={"name": device, **settings},
        versions={name: package_version(name) for name in ("torch", "transformers", "peft")},
        code=_source_digest(),
        asked=sizes,
    )
    return key_of("calibration", inputs)


@cache
def _source_digest() -> str:
    """Returns a digest of the code that is timed and of the code that predicts its time."""
    return code_digest(CALIBRATION_SOURCES)
