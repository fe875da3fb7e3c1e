"""Decoding time of one answer at a time: the base, the adapter beside it, the adapter merged."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from loracle.engine.decode import greedy
from loracle.engine.device import synchronize
from loracle.engine.evaluate import Progress
from loracle.model.base import FrozenBase
from loracle.model.faults import is_out_of_memory
from loracle.model.layers.lora import RoutedLinear
from loracle.model.layers.routing import Route

# assumed: what the rest of the process needs beside the frozen weights
_HOST_RESERVE_BYTES = 1 << 30


@dataclass(frozen=True)
class Latency:
    """Median decoding times of one answer at a time."""

    first_token_ms: float
    """Time from the prompt to the first token."""
    ms_per_token: float
    """Time of each further token."""


def measure_latency(
    base: FrozenBase,
    prompt: Sequence[int],
    *,
    adapter: str,
    new_tokens: int,
    trials: int,
    progress: Progress = lambda _: None,
) -> dict[str, Latency | None]:
    """Returns the latency of ``base``, ``unmerged`` and ``merged`` on one prompt, batch of 1.

    After one warm-up the variants take turns, so that drift of the machine affects all alike.
    ``merged`` is None if there is no memory to merge in, or for a base in 4 bits. EOS is
    suppressed, so each trial decodes exactly ``new_tokens``.
    """
    variants: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "base": lambda: base.generating(()),
        "unmerged": lambda: base.generating((Route(adapter),)),
    }
    if can_merge(base, adapter=adapter):
        variants["merged"] = lambda: generating_merged(base, adapter=adapter)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for trial in range(trials + 1):
        for name in list(variants):
            try:
                with variants[name]():
                    pair = (_decode_s(base, prompt, 1), _decode_s(base, prompt, new_tokens))
            except (RuntimeError, MemoryError) as error:
                if name != "merged" or not is_out_of_memory(error):
                    raise
                del variants[name], times[name]
                continue
            progress(1)
            if trial:
                times[name].append(pair)
    return {
        name: _latency(times[name], new_tokens) if name in times else None
        for name in ("base", "unmerged", "merged")
    }


def _latency(pairs: Sequence[tuple[float, float]], new_tokens: int) -> Latency:
    return Latency(
        first_token_ms=1e3 * statistics.median(first for first, _ in pairs),
        ms_per_token=1e3
        * statistics.median((total - first) / (new_tokens - 1) for first, total in pairs),
    )


def _decode_s(base: FrozenBase, prompt: Sequence[int], new_tokens: int) -> float:
    ids = torch.as_tensor(prompt, dtype=torch.int64, device=base.device)[None]
    config = greedy(base, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    synchronize(base.device)
    started_at = time.perf_counter()
    base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    synchronize(base.device)
    return time.perf_counter() - started_at


def can_merge(base: FrozenBase, *, adapter: str) -> bool:
    """Returns whether the adapter can be merged in place and the frozen weights put back.

    A base in 4 bits cannot: packing the merged weights again would give another model. On a GPU the
    frozen weights wait in the host's memory, which must have room for them.
    """
    if base.quantization is not None:
        return False
    if base.device.type == "cpu":
        return True
    weights = (layer.get_base_layer().weight for layer in _adapted(base, adapter=adapter))
    need = sum(weight.numel() * weight.element_size() for weight in weights)
    return bool(need + _HOST_RESERVE_BYTES < psutil.virtual_memory().available)


def merged_weight(layer: RoutedLinear, *, adapter: str) -> Tensor:
    """Returns W + scale * B A of an adapted layer, added in fp32, in the dtype of W."""
    weight: Tensor = layer.get_base_layer().weight.detach()
    merged: Tensor = (weight.float() + layer.get_delta_weight(adapter)).to(weight.dtype)
    return merged


@contextmanager
def generating_merged(base: FrozenBase, *, adapter: str) -> Iterator[None]:
    """Lends the model, for decoding, with merged weights in place of the frozen ones.

    The frozen ones leave the device meanwhile, because subtracting the update again would not
    restore their bits and a second copy would not fit beside a large base.
    """
    uses = Counter(map(id, (p for _, p in base.model.named_parameters(remove_duplicate=False))))
    frozen: list[tuple[Any, nn.Parameter]] = []
    try:
        for layer in _adapted(base, adapter=adapter):
            own = layer.get_base_layer()
            merged, parameter = merged_weight(layer, adapter=adapter), own.weight
            frozen.append((own, parameter))
            # A new parameter rather than new data in it, because a tied embedding shares it.
            own.weight = nn.Parameter(merged, requires_grad=False)
            if uses[id(parameter)] == 1:
                parameter.data = parameter.data.to("cpu")
        with base.generating(()):
            yield
    finally:
        # All merged ones go before the first frozen one comes back.
        for own, parameter in frozen:
            own.weight = parameter
        for _, parameter in frozen:
            parameter.data = parameter.data.to(base.device)


def _adapted(base: FrozenBase, *, adapter: str) -> list[RoutedLinear]:
    return [
        layer
        for layer in base.model.modules()
        if isinstance(layer, RoutedLinear) and adapter in layer.lora_A
    ]
