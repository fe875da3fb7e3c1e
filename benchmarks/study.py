"""A whole study, ours for real against a loop over TRL runs, extrapolated.

    python benchmarks/study.py [--contender trl-bf16] [--set KEY=VALUE]

Six arms x two seeds x 60 steps, with validation before, half-way and after, and BLEU. Ours is run
from start to end, each part of an interrupted one counted (``runs/bench/study``). The TRL loop
starts a process for every run, as a loop over a script does. Of each arm its start-up, a few
steps, a few batches of validation and one batch of answers are measured and scaled by counts:
padded positions, examples and answers. That figure is an extrapolation and is called one. Writes
``results/benchmarks/study-<date>-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()
_FOLDER = Path("runs/bench/study")
_LOG = _FOLDER / "blocks.jsonl"
_BEAT_S = 5.0
_SAMPLED_BATCHES = 2

ARMS = (
    "all-linear",
    "attention",
    "attention-qv",
    "feed-forward",
    "last-third",
    "output-projections",
)
_SEEDS = (0, 1)
# The demo's settings; latency is left out because the TRL loop would not measure it either.
_SETTINGS = (
    "train.max_steps=60",
    "eval.every_steps=30",
    "eval.generate_examples=32",
    "eval.max_new_tokens=128",
    "checkpoint.every_steps=20",
    "measure.latency_trials=0",
    "tracking.mode=disabled",
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", default="trl-bf16", help="a TRL of benchmarks/contenders.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        spec = json.loads(given.worker)
        print(json.dumps(run_ours(spec) if spec["kind"] == "ours" else sample_trl(spec)))
    else:
        run(contender=given.contender, overrides=given.set)


def run(*, contender: str, overrides: Sequence[str]) -> None:
    """Measures what is missing and writes the report."""
    from blocks import logged, run_once
    from figures import dated, sources_digest, write_report

    key = {"sources": sources_digest(), "overrides": list(overrides)}
    trl = [key | {"kind": "trl", "contender": contender, "arm": arm} for arm in ARMS]
    ours = [key | {"kind": "ours"}]
    for spec in [*trl, *ours]:
        row = run_once(spec, script=__file__, log=_LOG)
        if row is not None:
            print(spec["kind"], spec.get("arm", ""), row["error"] or "done", flush=True)
    report = report_of(logged(_LOG, ours)[0], logged(_LOG, trl))
    path = dated("study", report["environment"]["device"]["name"])
    write_report(path, report)
    print(f"{markdown(report)}\n\nwritten to {path}")


def run_ours(spec: Row) -> Row:
    """Runs the study, or what is left of it, and returns the seconds of all its parts."""
    import loracle
    from figures import environment_of, sources_digest
    from loracle.records.files import to_json
    from loracle.runner.run_many import run_many
    from loracle.runner.run_spec import RunSpec

    folder = _FOLDER / spec["sources"]
    _use_cache_without_results(folder / "cache")
    specs = []
    for seed in _SEEDS:
        for arm in ARMS:
            words = [*_SETTINGS, f"lora.placement={arm}", f"seed={seed}", *spec["overrides"]]
            config = loracle.load_config("base_config", overrides=words)
            specs.append(RunSpec(config, folder / f"{arm}-{seed}"))
    with beating(folder / "clock"):
        outcomes = run_many(specs)
    failed = [outcome.out.name for outcome in outcomes if outcome.error is not None]
    device = loracle.choose_device(specs[0].config.device)
    dtype = loracle.choose_dtype(specs[0].config.dtype, device=device)
    return {
        "error": f"failed: {', '.join(failed)}" if failed else None,
        "rows": [],
        "seconds": seconds_of(folder / "clock"),
        "results": {o.out.name: o.result and to_json(o.result) for o in outcomes},
        "sources": sources_digest(),
        "environment": environment_of(device, dtype),
    }


def _use_cache_without_results(folder: Path) -> None:
    """Points LoRAcle at a cache that has the models and the data and nothing that was computed."""
    from loracle.sources.cache import cache_folder

    folder.mkdir(parents=True, exist_ok=True)
    for kept in ("models", "data"):
        if not (folder / kept).exists() and (cache_folder() / kept).exists():
            (folder / kept).symlink_to((cache_folder() / kept).resolve())
    os.environ["LORACLE_CACHE"] = str(folder.resolve())


@contextmanager
def beating(folder: Path) -> Iterator[None]:
    """Keeps this process's age in a file while the block runs, so that a killed part counts too."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f"{time.time_ns()}.txt"
    over = threading.Event()

    def write() -> None:
        mine.write_text(f"{time.perf_counter() - _STARTED:.2f}\n", encoding="ascii")

    def beat() -> None:
        while not over.wait(_BEAT_S):
            write()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        write()


def seconds_of(folder: Path) -> float:
    """Returns the seconds of all parts of a study."""
    return sum(float(path.read_text(encoding="ascii")) for path in folder.glob("*.txt"))


def sample_trl(spec: Row) -> Row:
    """Returns the measured start-up, steps, validation and answers of one arm in TRL."""
    from datasets import disable_progress_bars

    from contenders import CONTENDERS
    from figures import environment_of, peak_gib, sources_digest
    from loops import clocked, trl_trainer
    from workload import counts_of, open_source, random_batches, workload_of

    source = open_source([*_SETTINGS, f"lora.placement={spec['arm']}", *spec["overrides"]])
    work = workload_of(source, random_batches(source, part=0, num_steps=_SAMPLED_BATCHES))
    disable_progress_bars()
    with trl_trainer(work, **CONTENDERS[spec["contender"]].changes) as trainer:
        built = time.perf_counter()
        rows = clocked(trainer, work)
        evaluation = _evaluation(trainer, source)
        answers = _answering(trainer, source)
    order, train = source.order(), source.config.train
    return {
        "error": None,
        "rows": rows,
        "start_s": built - _STARTED,
        "train_positions": sum(
            counts_of(order.batch(step))["num_padded"] for step in range(train.max_steps)
        ),
        "evaluation": evaluation,
        "answers": answers,
        "peak_gib": peak_gib(work.device),
        "sources": sources_digest(),
        "environment": environment_of(work.device, work.dtype),
    }


def _evaluation(trainer: Any, source: Any) -> Row:
    """Times validation as ``trainer.evaluate`` does it, and counts what all of it would be."""
    from loops import dataset_of
    from workload import counts_of

    held, size = source.data.validation, trainer.args.per_device_eval_batch_size
    wanted = held[: source.config.eval.max_examples or len(held)]
    batches = [list(wanted[i : i + size]) for i in range(0, len(wanted), size)]
    sample = batches[:_SAMPLED_BATCHES]
    began = time.perf_counter()
    trainer.evaluate(dataset_of(sample))
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "positions": sum(counts_of(batch)["num_padded"] for batch in sample),
        "all_positions": sum(counts_of(batch)["num_padded"] for batch in batches),
    }


def _answering(trainer: Any, source: Any) -> Row:
    """Times one batch of greedy answers with ``generate``, the model as training left it."""
    import torch

    evaluation = source.config.eval
    count = min(evaluation.generate_examples, 16, len(source.data.validation))
    prompts = [each.input_ids[: each.num_prompt] for each in source.data.validation[:count]]
    width = max(map(len, prompts))
    pad = trainer.processing_class.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model = trainer.model.eval()
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=real.to(model.device),
            max_new_tokens=evaluation.max_new_tokens,
            do_sample=False,
        )
    return {
        "seconds": time.perf_counter() - began,
        "count": count,
        "all": evaluation.generate_examples,
    }


def report_of(ours: Row, trl: Sequence[Row]) -> Row:
    """Returns both sides; TRL's is extrapolated from what was measured of each arm."""
    worked = [block for block in trl if block["error"] is None]
    arms = {block["spec"]["arm"]: extrapolated(block) for block in worked}
    untuned = sum(arms[ARMS[0]][part] for part in ("one_validation_s", "answers_s"))
    trl_s = len(_SEEDS) * sum(arm["run_s"] for arm in arms.values()) + untuned
    complete = len(worked) == len(ARMS) and ours["error"] is None
    return {
        "schema": 1,
        "what": f"{len(ARMS)} arms x {len(_SEEDS)} seeds with validation and BLEU",
        "environment": ours["environment"],
        "ours_s": ours["seconds"],
        "trl": {
            "how": "EXTRAPOLATED from measured start-up, steps, validation and answers of each arm",
            "contender": trl[0]["spec"]["contender"],
            "seconds": trl_s,
            "untuned_s": untuned,
            "arms": arms,
        },
        "times_ours": trl_s / ours["seconds"] if complete else None,
        "errors": [block["error"] for block in [ours, *trl] if block["error"] is not None],
        "blocks": [ours, *trl],
    }


def extrapolated(block: Row) -> Row:
    """Returns the seconds of one TRL run, from its measured parts scaled by counts."""
    counted = [row for row in block["rows"] if not row["warm_up"]]
    per_position = sum(r["step_time_s"] for r in counted) / sum(r["num_padded"] for r in counted)
    validation, answers = block["evaluation"], block["answers"]
    parts = {
        "start_s": block["start_s"],
        "steps_s": per_position * block["train_positions"],
        "one_validation_s": validation["seconds"]
        / validation["positions"]
        * validation["all_positions"],
        "answers_s": answers["seconds"] / answers["count"] * answers["all"],
    }
    # Half-way and after; before training every run is the untuned model, counted once for all.
    run_s = sum(parts.values()) + parts["one_validation_s"]
    return parts | {"run_s": run_s}


def markdown(report: Row) -> str:
    """Returns the study's table."""
    from figures import table

    rows = [
        ("LoRAcle, measured", f"{report['ours_s'] / 60:.0f}", "1"),
        (
            f"loop over {report['trl']['contender']}, extrapolated",
            f"{report['trl']['seconds'] / 60:.0f}",
            f"{report['times_ours']:.1f}" if report["times_ours"] else "n/a",
        ),
    ]
    return table((report["what"], "minutes", "times ours"), rows)


if __name__ == "__main__":
    main()
