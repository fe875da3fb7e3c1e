"""How near `loracle plan` comes to what was measured.

    python benchmarks/plan_accuracy.py STUDY [STUDY ...]     of studies, again, from their records
    python benchmarks/plan_accuracy.py --counted             live tensors of real steps, here

``--counted`` takes real steps of SmolLM2-135M and of a 1B-class geometry with random weights, at
several placements, two batch shapes, with checkpointing and without, and counts their tensors with
the accounting that the prediction uses. It needs about 12 GiB and an hour or two on two cores; what
is in ``--out`` already is not taken again, so it can be stopped and gone on with.
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
from loracle.config.files import load_config
from loracle.forecast.meta_base import (
    fake_tensors,
    fill,
    meta_adapter,
    meta_base,
    one_word_tokenizer,
)
from loracle.forecast.trace import synthetic_examples, trace_step
from loracle.model.adapters import attach_adapter
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.norm import install_fast_norms
from loracle.placement import resolve_placement
from loracle.quiet import quiet_transformers
from loracle.records.predictions import keep_accuracy, kept_accuracy
from loracle.records.study_folder import read_study
from loracle.sources import catalog
from loracle.study.accuracy import accuracy_of

MODELS = ("smollm2-135m", "tinyllama-1.1b")
PLACEMENTS = (
    "all-linear", "attention", "attention-qv", "feed-forward",
    "output-projections", "first-third", "middle-third", "last-third",
)  # fmt: skip
SHAPES = {"8 x 204 tokens": [(54, 150)] * 8, "2 x 512 tokens": [(60, 452)] * 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", type=Path, metavar="STUDY")
    parser.add_argument("--counted", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, help="where --counted leaves its figures, as JSON")
    given = parser.parse_args()
    for folder in given.studies:
        keep_accuracy(folder, accuracy_of(read_study(folder)))
        for each in kept_accuracy(folder):
            print(f"{folder.name}  {each.arm:20} memory {_percent(each.memory_error_frac)}"
                  f"  time {_percent(each.time_error_frac)}")  # fmt: skip
    if given.counted:
        rows = _kept(given.out)
        for row in (row for model in given.models for row in counted(model, known=rows)):
            rows.append(row)
            _keep(given.out, rows)
        errors = [abs(row["error_frac"]) for row in rows]
        print(f"{len(rows)} steps: median {100 * statistics.median(errors):.3f} %, "
              f"at most {100 * max(errors):.3f} %")  # fmt: skip
    return 0


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:+.2f} %"


def _kept(out: Path | None) -> list[dict[str, Any]]:
    if out is None or not out.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


def _keep(out: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
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
    """Yields predicted and counted bytes of real steps, those that are not known yet."""
    architecture = catalog().models[model].architecture
    had = [_case(row) for row in known]
    for placement in PLACEMENTS:
        for shape, lengths in SHAPES.items():
            for checkpointing in (False, True):
                case = {"model": model, "placement": placement, "shape": shape,
                        "checkpointing": checkpointing}  # fmt: skip
                if _case(case) in had:
                    continue
                config = load_config(
                    "demo",
                    overrides=[f"lora.placement={placement}",
                               f"train.gradient_checkpointing={str(checkpointing).lower()}"],
                )  # fmt: skip
                ours = _predicted(architecture, config, lengths=lengths)
                theirs = _real(architecture, config, lengths=lengths)
                row = case | {"predicted_bytes": ours, "counted_bytes": theirs,
                              "error_frac": (ours - theirs) / theirs}  # fmt: skip
                print(json.dumps(row), file=sys.stderr)
                yield row


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "placement", "shape", "checkpointing"))


def _predicted(architecture: Any, config: Any, *, lengths: Any) -> int:
    base = meta_base(architecture, dtype=torch.bfloat16)
    adapter = meta_adapter(base, plan=_plan(base, config), dropout=config.lora.dropout)
    with fake_tensors():
        adapter = fill(base, adapter)
        examples = synthetic_examples(lengths)
        return trace_step(base, adapter=adapter, config=config, examples=examples).peak


def _real(architecture: Any, config: Any, *, lengths: Any) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    register_packed_attention()
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**architecture), dtype=torch.bfloat16, attn_implementation=PACKED
        )
    model = model.eval().requires_grad_(False)
    install_fast_norms(model)
    base = FrozenBase(
        model=model,
        tokenizer=one_word_tokenizer(),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    adapter = attach_adapter(
        base,
        name="default",
        plan=_plan(base, config),
        dropout=config.lora.dropout,
        seed=0,
        model_source="random",
    )
    examples = synthetic_examples(lengths)
    peak = trace_step(base, adapter=adapter, config=config, examples=examples).peak
    del base, adapter, model
    gc.collect()
    return peak


def _plan(base: FrozenBase, config: Any) -> Any:
    lora = config.lora
    return resolve_placement(
        lora.placement, inventory=inventory_of(base.model), rank=lora.rank, alpha=lora.alpha
    )


if __name__ == "__main__":
    sys.exit(main())
