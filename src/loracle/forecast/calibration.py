"""How fast this device is, measured: its products, its memory, its calls, and a step of ours.

What lies between those is taken together as one factor: measured over predicted time of a step of
a small random model, of the shape of the models that are tuned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from loracle.config.files import load_config
from loracle.engine.device import choose_device, choose_dtype, dtype_name, synchronize
from loracle.engine.throughput import token_rates
from loracle.errors import RunFolderError
from loracle.forecast.devices import Device, this_device
from loracle.forecast.op_costs import Rates
from loracle.records.files import read_json, write_json
from loracle.sources.cache import cache_folder
from loracle.text import slug_of

_SCHEMA = 1
# assumed: long enough to tell, short enough to wait for
_REPEATS = 5
_STEPS = 6
_CALLS = 2000
_ADDED = 1 << 23

# Of the random model whose step is measured, by kind of device.
_SIZES = {
    "cpu": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6},
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4},
}
_HEAD_SIZE = 64
_VOCABULARY = 8192
_BATCH = [(54, 150)] * 8


@dataclass(frozen=True)
class Calibration:
    """What was measured of a device."""

    device: str
    """Its name."""
    dtype: str
    """Of the products."""
    threads: int
    """Of a CPU; what PyTorch was set to."""
    flop_per_s: float
    byte_per_s: float
    overhead_s: float
    """Per call."""
    factor: float
    """Measured over predicted time of a step."""
    measured_at: str
    """Date."""
    torch: str
    """Version."""

    def rates(self, *, overlaps: bool) -> Rates:
        """Returns it as what times are predicted from."""
        return Rates(
            self.flop_per_s, self.byte_per_s, self.overhead_s, overlaps=overlaps, factor=self.factor
        )


def calibrate(*, say: Callable[[str], None] = lambda _: None) -> Calibration:
    """Returns what this machine's device does, after measuring it for some seconds.

    Args:
        say: Told what is being measured.
    """
    device = choose_device("auto")
    dtype = choose_dtype("auto", device=device)
    say("products")
    flops = _products(device, dtype)
    say("memory")
    moved = _moved(device, dtype)
    say("calls")
    overhead = _overhead(device)
    say("a step")
    plain = Rates(flops, moved, overhead, overlaps=device.type == "cuda")
    predicted, measured = _step(device, dtype, rates=plain)
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
    one = torch.ones(_ADDED, dtype=dtype, device=device)
    out = torch.empty_like(one)
    times = _timed(lambda: torch.add(one, one, out=out), device=device)
    return 3 * _ADDED * dtype.itemsize / times


def _overhead(device: torch.device) -> float:
    one = torch.ones(16, device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            one.add_(1.0)

    return _timed(calls, device=device) / _CALLS


def _timed(run: Callable[[], object], *, device: torch.device) -> float:
    """Returns the fastest of a few runs, after one that is not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _step(device: torch.device, dtype: torch.dtype, *, rates: Rates) -> tuple[float, float]:
    """Returns predicted and measured seconds of a step of a small model with random weights."""
    from loracle.forecast.meta_base import fill, pretend_adapter, pretend_base, pretending
    from loracle.forecast.predict import kind_of
    from loracle.forecast.trace import made_up_examples, trace_step
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
    examples = made_up_examples(_BATCH)
    pretended = pretend_base(architecture, dtype=dtype)
    adapter = pretend_adapter(pretended, plan=plan, dropout=config.lora.dropout)
    kind = kind_of(this_device(), plan=plan)
    with pretending(kind):
        adapter = fill(pretended, adapter) if kind == "cpu" else adapter
        traced = trace_step(pretended, adapter=adapter, config=config, examples=examples)
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
    from transformers import AutoConfig, AutoModelForCausalLM

    from loracle.engine.train import train_bundle
    from loracle.engine.train_state import new_run
    from loracle.forecast.meta_base import unspoken_tokenizer
    from loracle.forecast.trace import made_up_examples
    from loracle.model.adapters import attach_adapter
    from loracle.model.base import FrozenBase
    from loracle.model.layers.attention import PACKED
    from loracle.model.layers.norm import install_fast_norms
    from loracle.quiet import quiet_transformers

    with quiet_transformers(), device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**architecture), dtype=dtype, attn_implementation=PACKED
        )
    model = model.to(device).eval().requires_grad_(False)
    install_fast_norms(model)
    base = FrozenBase(model=model, tokenizer=unspoken_tokenizer(), device=device, dtype=dtype)
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
        examples=made_up_examples(_BATCH),
        train=config.train.model_copy(update={"max_steps": _STEPS}),
        dropout=config.lora.dropout,
        seed=0,
    )
    steps = train_bundle(base, [run], micro_batch_tokens=config.train.micro_batch_tokens)
    times = [record.step_time_s for (record,) in steps if record is not None]
    return statistics.median(times[2:])


def keep_calibration(found: Calibration) -> Path:
    """Leaves a calibration in the cache, where plans find it, and returns its file."""
    path = _path(found.device, found.dtype, found.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": _SCHEMA, **asdict(found)})
    return path


def known_calibration(device: Device, *, dtype: str) -> Calibration | None:
    """Returns what was measured of a device on this machine; None if nothing was, or is readable.

    Args:
        device: Its name counts.
        dtype: Of the products.
    """
    path = _path(device.name, dtype, torch.get_num_threads())
    if not path.is_file():
        return None
    try:
        kept = dict(read_json(path))
        if kept.pop("schema") != _SCHEMA:
            return None
        return Calibration(**kept)
    except (RunFolderError, TypeError, KeyError):
        return None


def _path(device: str, dtype: str, threads: int) -> Path:
    name = slug_of(f"{device} {dtype} {threads}-threads")
    return cache_folder() / "calibration" / f"{name}.json"
