"""The accuracy of `loracle plan`: its predictions against measurements.

    python benchmarks/plan_accuracy.py STUDY [STUDY ...]     studies again, from their records
    python benchmarks/plan_accuracy.py --counted             live tensors of real steps, here

``--counted`` runs real steps of SmolLM2-135M and of a 1B-class geometry with random weights, at
several placements, two batch shapes, with checkpointing and without, and counts their tensors as
the prediction does. It needs about 12 GiB and an hour or two on two cores; steps that are already
in ``--out`` are not repeated, so it can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from figures import environment_of, write_report
from geometry import random_base
from loracle.config.files import load_config
from loracle.forecast.devices import Device
from loracle.forecast.trace import synthetic_examples, trace_step
from loracle.model.adapters import attach_adapter
from loracle.model.layers.fast_parts import install_fast_parts
from loracle.records.predictions import keep_accuracy, kept_accuracy
from loracle.records.study_folder import read_study
from loracle.sources import catalog
from loracle.study.accuracy import accuracy_of
from predicted import plan_from, predicted_step

MODELS = ("smollm2-135m", "tinyllama-1.1b")
PLACEMENTS = (
    "all-linear", "attention", "attention-qv", "feed-forward",
    "output-projections", "first-third", "middle-third", "last-third",
)  # fmt: skip
_CPU = Device("cpu", memory_gib=0.0, has_bf16=True, is_gpu=False)
SHAPES = {"8 x 204 tokens": [(54, 150)] * 8, "2 x 512 tokens": [(60, 452)] * 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", type=Path, metavar="STUDY")
    parser.add_argument("--counted", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, help="where --counted writes its figures, as JSON")
    given = parser.parse_args()
    for folder in given.studies:
        keep_accuracy(folder, accuracy_of(read_study(folder)))
        for arm in kept_accuracy(folder):
            print(f"{folder.name}  {arm.arm:20} memory {_percent(arm.memory_error_frac)}"
                  f"  time {_percent(arm.time_error_frac)}")  # fmt: skip
    if given.counted:
        rows = _read(given.out)
        for row in (row for model in given.models for row in counted(model, known=rows)):
            rows.append(row)
            _write(given.out, rows)
        errors = [abs(row["error_frac"]) for row in rows]
        print(f"{len(rows)} steps: median {100 * statistics.median(errors):.3f} %, "
              f"at most {100 * max(errors):.3f} %")  # fmt: skip
    return 0


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:+.2f} %"


def _read(out: Path | None) -> list[dict[str, Any]]:
    if out is None or not out.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


def _write(out: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    if out is None:
        return
    report = {
        "schema": 1,
        "what": "most bytes of live tensors at once in an optimizer step: predicted without "
        "weights, and counted of a real step; bf16 base",
        "environment": environment_of(torch.device("cpu"), torch.bfloat16),
        "rows": rows,
    }
    write_report(out, report)


def counted(model: str, *, known: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]:
    """Yields predicted and counted bytes of real steps, except those of ``known`` rows."""
    architecture = catalog().models[model].architecture
    done = [_case(row) for row in known]
    for placement in PLACEMENTS:
        for shape, lengths in SHAPES.items():
            for checkpointing in (False, True):
                case = {"model": model, "placement": placement, "shape": shape,
                        "checkpointing": checkpointing}  # fmt: skip
                if _case(case) in done:
                    continue
                config = load_config(
                    "demo",
                    overrides=[f"lora.placement={placement}",
                               f"train.gradient_checkpointing={str(checkpointing).lower()}"],
                )  # fmt: skip
                predicted = predicted_step(architecture, config=config, device=_CPU,
                                           dtype=torch.bfloat16, lengths=lengths).peak  # fmt: skip
                real = _counted(architecture, config, lengths=lengths)
                row = case | {"predicted_bytes": predicted, "counted_bytes": real,
                              "error_frac": (predicted - real) / real}  # fmt: skip
                print(json.dumps(row), file=sys.stderr)
                yield row


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "placement", "shape", "checkpointing"))


def _counted(architecture: Any, config: Any, *, lengths: Any) -> int:
    base = random_base(architecture, device=torch.device("cpu"), dtype=torch.bfloat16)
    install_fast_parts(base.model)
    adapter = attach_adapter(
        base,
        name="default",
        plan=plan_from(architecture, config),
        dropout=config.lora.dropout,
        seed=0,
        model_source="random",
    )
    examples = synthetic_examples(lengths)
    peak = trace_step(base, adapter=adapter, config=config, examples=examples).peak
    del base, adapter
    gc.collect()
    return peak


if __name__ == "__main__":
    sys.exit(main())
