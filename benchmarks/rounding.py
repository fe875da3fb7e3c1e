"""How far the losses of one model lie apart when only the order of sums inside products changes.

    python benchmarks/rounding.py RUN [--seconds 200]     measures; again: goes on
    python benchmarks/rounding.py RUN --publish           fits and writes the table

``RUN`` is a folder of ``loracle baseline demo``: its adapter is scored through the default model on
the demo's first validation examples, as the audit scores it, in every order of ``summation.py`` and
through stock Transformers and PEFT; then in fp32 with each fault. Random models of several depths
say how the spread grows. Every pass is logged in ``runs/bench/rounding.jsonl``. The table,
``results/benchmarks/rounding-<date>-<device>.json``, gives ``loracle/runner/audit.py`` its limits.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch

from figures import Row, append_line, environment_of, publish, read_lines
from geometry import GEOMETRIES, random_base, random_examples
from loracle.data import Example
from loracle.engine.device import choose_dtype
from loracle.engine.evaluate import score_examples
from loracle.model.adapters import load_adapter
from loracle.model.base import FrozenBase
from loracle.model.load import load_base
from loracle.placement import ModulePlan
from loracle.records.files import read_json
from loracle.records.names import ADAPTER, ADAPTER_WEIGHTS, MODULES
from loracle.runner.audit import stock_nll_sums
from rounding_fit import fitted, lines_of
from summation import ORDERS, faulty, summing
from workload import Source, open_source

_LOG = Path("runs/bench/rounding.jsonl")
EXAMPLES = 32  # the default of audit.reload_examples
_CPU = torch.device("cpu")
_DTYPES = {
    "bfloat16": ("stock", "machine", "whole", "split-2", "split-4-narrow", "shuffled", "tiles-12"),
    "float32": ("machine", "split-2", "stock", "shuffled"),
    "float16": ("whole", "split-2", "split-4-narrow", "stock"),
    "nf4": ("whole", "split-2", "split-4-narrow", "stock"),
}
"""The orders of each way to compute, the ones that limits need first; ``nf4`` computes in bf16."""
FAULTS = (
    "lost", "scale-1.1", "swap-14", "module-118", "scale-0.9", "module-45", "layer-14", "scale-1.5",
    "scale-0.5", "swap-2", "module-206", "layer-29", "scale-1.05", "module-3", "layer-0", "swap-27",
)  # fmt: skip
_DEPTHS = (4, 8, 16, 32, 64)
_LENGTHS = (32, 128, 512)


def random_specs() -> Iterator[Row]:
    """Yields the passes of random models: depths, lengths, dtypes and orders."""
    for dtype in ("bfloat16", "float16"):
        for depth, length in [(d, 128) for d in _DEPTHS] + [(8, n) for n in _LENGTHS]:
            for order in ("whole", "split-2", "split-4-narrow"):
                yield {
                    "model": f"random-{depth}", "length": length, "dtype": dtype, "order": order,
                    "fault": "none",
                }  # fmt: skip


def specs() -> list[Row]:
    """Returns every pass, the ones that limits need most first."""
    real = {"model": "smollm2-135m", "length": None}
    groups = [
        [{**real, "dtype": dtype, "order": order, "fault": "none"} for order in names]
        for dtype, names in _DTYPES.items()
    ]
    faults = [{**real, "dtype": "float32", "order": "machine", "fault": fault} for fault in FAULTS]
    first = [spec for group in groups for spec in group[:3]]
    found = [*first, *faults[:4], *itertools.chain(*groups), *random_specs(), *faults]
    return list({str(spec): spec for spec in found}.values())


@cache
def source() -> Source:
    return open_source([])


@cache
def tuned(dtype: str, run: Path) -> FrozenBase:
    """Returns the default model with the run's adapter."""
    name = "bfloat16" if dtype == "nf4" else dtype
    base = load_base(
        source().folder,
        device=_CPU,
        dtype=choose_dtype(name, device=_CPU),
        quantization="nf4" if dtype == "nf4" else None,
    )
    load_adapter(
        base,
        name="default",
        plan=ModulePlan.from_json(read_json(run / MODULES)),
        saved=run / ADAPTER / ADAPTER_WEIGHTS,
        model_source="smollm2-135m",
    )
    return base


def random_deep(depth: int, *, dtype: str) -> FrozenBase:
    """Returns a small random model; its weights are wide enough for it to be sure of something."""
    shape = GEOMETRIES["tiny"] | {"num_hidden_layers": depth, "initializer_range": 0.15}
    return random_base(shape, device=_CPU, dtype=choose_dtype(dtype, device=_CPU))


def measured(spec: Row, *, run: Path) -> Row:
    """Returns the sum of -ln p of each example in one pass, with its target tokens."""
    kind, _, depth = spec["model"].partition("-")
    if kind == "random":
        base = random_deep(int(depth), dtype=spec["dtype"])
        examples = random_examples("tiny", count=200, length=spec["length"])
        return _scored(base, examples, order=spec["order"], adapter=None)
    base = tuned(spec["dtype"], run)
    examples = source().data.validation[:EXAMPLES]
    if spec["order"] == "stock":
        sums = stock_nll_sums(
            run / ADAPTER, model_folder=source().folder, examples=examples, like=base
        )
        return {"nll_sum_nats": sums, "tokens": [e.num_targets for e in examples]}
    with faulty(base, spec["fault"]):
        return _scored(base, examples, order=spec["order"], adapter="default")


def _scored(
    base: FrozenBase, examples: Sequence[Example], *, order: str, adapter: str | None
) -> Row:
    with torch.inference_mode(), summing(ORDERS[order]):
        scores = score_examples(base, examples, adapter=adapter, batch_tokens=4096)
    return {
        "nll_sum_nats": [score.nll_sum_nats for score in scores],
        "tokens": [score.num_targets for score in scores],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of the demo")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no pass after")
    parser.add_argument("--dtype", default="", help="only its passes")
    parser.add_argument("--publish", action="store_true")
    args = parser.parse_args()
    if not args.publish:
        started, done = time.monotonic(), [row["spec"] for row in read_lines(_LOG)]
        for spec in specs():
            if not spec["dtype"].startswith(args.dtype) or spec in done:
                continue
            if time.monotonic() - started < args.seconds:
                append_line(_LOG, {"spec": spec, **measured(spec, run=args.run)})
                print(spec, f"{time.monotonic() - started:.0f} s", flush=True)
        return
    report = {**fitted(read_lines(_LOG)), "environment": environment_of(_CPU, torch.bfloat16)}
    publish("rounding", report, text="\n".join(lines_of(report)))


if __name__ == "__main__":
    main()
