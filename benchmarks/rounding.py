"""How far losses of packed rows and of single sequences through stock Transformers lie apart.

    python benchmarks/rounding.py [--examples 40] [--dtype bfloat16]

The untuned default model on the demo's validation examples. In 16 bits products may depend on the
shape of a batch; the audit allows what this measures (``loracle/runner/audit.py``). Writes
``results/benchmarks/rounding-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from figures import environment_of, publish, table
from loracle.data import Example
from loracle.engine.evaluate import score_examples
from loracle.model.base import FrozenBase
from loracle.runner.audit import stock_nll_sums
from workload import load_frozen, open_source, workload_of


def measure(base: FrozenBase, examples: Sequence[Example], *, folder: Path) -> dict[str, Any]:
    """Returns what ``difference`` says of packed rows against stock, on this base."""
    packed = score_examples(base, examples, adapter=None, batch_tokens=4096)
    stock = stock_nll_sums(None, model_folder=folder, examples=examples, like=base)
    return difference(
        [score.nll_sum_nats for score in packed], stock, [score.num_targets for score in packed]
    )


def difference(
    packed: Sequence[float], stock: Sequence[float], tokens: Sequence[int]
) -> dict[str, Any]:
    """Returns mean and standard deviation of the difference per target token, in nats.

    The errors of tokens are taken as independent: that of an example grows with the root of its
    tokens.

    Args:
        packed: Sum of -ln p of each example in packed rows.
        stock: The same by stock Transformers.
        tokens: Target tokens of each example.
    """
    gaps = [one - other for one, other in zip(packed, stock, strict=True)]
    squares = [gap**2 / count for gap, count in zip(gaps, tokens, strict=True)]
    return {
        "num_examples": len(gaps),
        "num_targets": sum(tokens),
        "mean_nats_per_token": math.fsum(gaps) / sum(tokens),
        "std_nats_per_token": math.sqrt(math.fsum(squares) / len(squares)),
        "loss_nats_per_token": math.fsum(stock) / sum(tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    source = open_source([f"dtype={args.dtype}"])
    work = workload_of(source, [])
    base = load_frozen(work)
    with torch.inference_mode():
        found = measure(base, source.data.validation[: args.examples], folder=source.folder)
    report = {**found, "environment": environment_of(work.device, work.dtype)}
    publish(
        "rounding", report, text=table(["", "value"], [(k, f"{v:.4g}") for k, v in found.items()])
    )


if __name__ == "__main__":
    main()
