"""The floor of a step: the time of its matrix products alone.

For the token and target counts of each batch, every product with a frozen weight is timed: forward
and with respect to its input, in the base's dtype, into warm buffers, with nothing in between. The
rest of a step's time is everything that is not such a product. The input gradients of the lowest
layer's first projections are counted though no step needs them (0.1 % of the total).

Shapes: T tokens, N targets, I input and O output features, r rank, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from loracle.engine.device import keep_large_blocks, synchronize
from loracle.model.layers.head import CHUNK_ROWS
from loracle.placement import ModulePlan
from workload import Workload, counts_of, plan_of, shape_of

_REPEATS = 5
_WARM_UPS = 2

Product = tuple[int, int, int]
"""Rows, inner and outer size: (rows, inner) times (inner, outer)."""


def floor_rows(work: Workload) -> list[dict[str, Any]]:
    """Returns the floor of each batch of the block, in seconds."""
    keep_large_blocks()
    model = shape_of(work)
    plan = plan_of(model, work.config)
    everything = plan_of(model, work.config, "all-linear")
    vocab, hidden = model.get_output_embeddings().weight.shape
    rows = []
    for index, batch in enumerate(work.batches):
        counts = counts_of(batch)
        tokens, targets = counts["num_tokens"], counts["num_targets"]
        base = base_products(everything, tokens=tokens)
        head = head_products(vocab, hidden, targets=targets)
        lora = lora_products(plan, tokens=tokens)
        rows.append(
            {
                "step": index,
                "warm_up": index == 0,
                "base_s": seconds_of(base + head, work=work),
                "lora_s": seconds_of(lora, work=work),
                "base_gflop": flops_of(base + head) / 1e9,
                "lora_gflop": flops_of(lora) / 1e9,
                **counts,
            }
        )
    return rows


def base_products(plan: ModulePlan, *, tokens: int) -> Counter[Product]:
    """Returns the products with the layers' frozen weights: T I O forward, T O I backward."""
    sizes = [(module.in_features, module.out_features) for module in plan.modules]
    return Counter((tokens, *size) for i, o in sizes for size in ((i, o), (o, i)))


def head_products(vocab: int, hidden: int, *, targets: int) -> Counter[Product]:
    """Returns the head's products at target positions, in chunks that fit the cache."""
    chunks = [min(CHUNK_ROWS, targets - start) for start in range(0, targets, CHUNK_ROWS)]
    return Counter((n, *size) for n in chunks for size in ((hidden, vocab), (vocab, hidden)))


def lora_products(plan: ModulePlan, *, tokens: int) -> Counter[Product]:
    """Returns the six products of each adapter: z, its update, dz, dx, dA and dB."""
    products: Counter[Product] = Counter()
    for module in plan.modules:
        r, i, o = module.rank, module.in_features, module.out_features
        products.update([(tokens, i, r), (tokens, r, o), (tokens, o, r), (tokens, r, i)])
        products.update([(r, tokens, i), (o, tokens, r)])
    return products


def flops_of(products: Counter[Product]) -> int:
    """Returns the floating-point operations of the products."""
    return sum(2 * rows * inner * outer * n for (rows, inner, outer), n in products.items())


def seconds_of(products: Counter[Product], *, work: Workload) -> float:
    """Returns the time of all products in sequence, from each one's median."""
    return sum(
        count * product_s(product, device=work.device, dtype=work.dtype)
        for product, count in products.items()
    )


def product_s(product: Product, *, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the median time of one product into a warm buffer, in seconds."""
    rows, inner, outer = product
    left = torch.randn(rows, inner, dtype=torch.float32, device=device).to(dtype)
    # Stored as PyTorch stores a weight of (outer, inner); the input gradient reads it untransposed.
    right = torch.randn(outer, inner, dtype=torch.float32, device=device).to(dtype).T
    out = torch.empty(rows, outer, dtype=dtype, device=device)
    return median_s(lambda: torch.mm(left, right, out=out), device=device)


def median_s(run: Callable[[], Any], *, device: torch.device) -> float:
    """Returns the median time of a call after warm-ups, in seconds."""
    times = []
    for _ in range(_REPEATS + _WARM_UPS):
        synchronize(device)
        started_at = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[_WARM_UPS:])
