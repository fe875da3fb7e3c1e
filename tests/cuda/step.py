"""python tests/cuda/run.py CARD python tests/cuda/step.py CASE ... - counts of an optimizer step.

The model is LLaMA-2-7B with ``--layers`` layers, all-linear adapters, 8 examples of 512 tokens a
step in passes of 2048 tokens. Prints one JSON object a case and number of layers. Cases are keys of
``CASES``; without one, all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

_WARM_UPS = 2  # the optimizer has its state, kernels are chosen and compiled
_CLOCKED = 3


@dataclass(frozen=True)
class Case:
    """What takes the step."""

    engine: str = "loracle"
    dropout: float = 0.1
    checkpointing: bool = False
    packing: str | None = None
    runs: int = 1
    rank: int = 16
    batch: int = 8
    tokens: int = 512
    pass_tokens: int = 2048
    """Tokens of a pass of one run; a bundle's pass holds this many of each."""
    steps: int = _WARM_UPS + _CLOCKED + 1

    @property
    def passes(self) -> int:
        """Passes of a step."""
        return -(-self.batch * self.tokens // self.pass_tokens)

    def batches(self) -> list[list[int]]:
        """Tokens of each example of each step: other lengths every step, as many in every pass."""
        return [
            [self.tokens + (step if k % 2 else -step) for k in range(self.batch)]
            for step in range(self.steps)
        ]


CASES = {
    "ours": Case(),
    "ours, dropout 0": Case(dropout=0.0),
    "ours, checkpointing": Case(checkpointing=True),
    "ours, NF4 and checkpointing": Case(packing="nf4", checkpointing=True),
    "ours, bundle of 4": Case(runs=4),
    "PEFT": Case(engine="peft"),
    "PEFT, dropout 0": Case(engine="peft", dropout=0.0),
    "PEFT, checkpointing": Case(engine="peft", checkpointing=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    given = parser.parse_args()
    for name in given.cases or CASES:
        for layers in given.layers:
            print(json.dumps({"case": name, **measure(CASES[name], layers=layers)}), flush=True)


def measure(case: Case, *, layers: int) -> dict[str, Any]:
    """Returns counts, host seconds and peak of a step after the warm-up."""
    from moved import Moved

    with tempfile.TemporaryDirectory() as folder:
        steps = (_our_steps if case.engine == "loracle" else _peft_steps)(
            case, _folder(Path(folder), layers=layers)
        )
        for _ in range(_WARM_UPS):
            next(steps)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        row = {"layers": layers, "passes": case.passes, **asdict(case), **_clocked(steps)}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["forecast_gib"] = forecast_gib(case, layers=layers)
        moved = Moved()
        with moved, moved.triton_too():
            next(steps)
        steps.close()
    gc.collect()
    torch.cuda.empty_cache()
    gbytes = {place: num / 1e9 for place, num in moved.num_bytes.most_common()}
    return row | {
        "gbyte": sum(gbytes.values()),
        "gbyte_beside_frozen_products": sum(gbytes.values()) - moved.frozen_products / 1e9,
        "operations": moved.calls.total(),
        "gbyte_by_file": gbytes,
    }


def _clocked(steps: Iterator[Any]) -> dict[str, Any]:
    """Counts of the last of a few steps, and the least host seconds of them."""
    import answers

    seconds, cpu = [], []
    for _ in range(_CLOCKED):
        answers.forget()
        started_at, cpu_at = time.perf_counter(), time.process_time()
        next(steps)
        seconds.append(time.perf_counter() - started_at)
        cpu.append(time.process_time() - cpu_at)
        counts, kernels, waits = answers.counts(), answers.kernels(), dict(answers.waits)
    kept = ("launches", "kernels", "products", "graphs", "waits", "to_device", "pageable", "fills")
    return {
        **{name: counts[name] for name in kept},
        "on_device_copies": counts["on_device"],
        "tflop": counts["flop"] / 1e12,
        "host_s": min(seconds),
        "host_cpu_s": min(cpu),
        "wait_lines": waits,
        "most_launched": dict(list(kernels.items())[:12]),
    }


def forecast_gib(case: Case, *, layers: int) -> float | None:
    """Returns the peak as ``loracle plan`` predicts it; None for what it does not plan."""
    from geometry import GEOMETRIES
    from loracle import choose_device, choose_dtype
    from loracle.forecast.devices import this_device
    from predicted import predicted_step

    if case.engine != "loracle" or case.runs > 1:
        return None
    predicted = predicted_step(
        GEOMETRIES["llama-2-7b"] | {"num_hidden_layers": layers},
        config=_config(case, seed=0),
        device=this_device(),
        dtype=choose_dtype("auto", device=choose_device("auto")),
        lengths=[(case.tokens // 3, case.tokens - case.tokens // 3)] * case.batch,
    )
    return predicted.peak / 2**30


def _config(case: Case, *, seed: int) -> Any:
    from workload import config_of

    return config_of(
        "model=path:x",
        f"lora.dropout={case.dropout}",
        f"lora.rank={case.rank}",
        f"quantization={case.packing or 'null'}",
        f"seed={seed}",
        f"train.max_steps={case.steps}",
        f"train.batch_size={case.batch}",
        f"train.micro_batch_tokens={case.pass_tokens}",
        f"train.gradient_checkpointing={str(case.checkpointing).lower()}",
    )


def _folder(folder: Path, *, layers: int) -> Path:
    from holes import write_holes

    from loracle import choose_device, choose_dtype

    half = choose_dtype("auto", device=choose_device("auto")) == torch.float16
    return write_holes(folder / "model", layers=layers, dtype="F16" if half else "BF16")


def _our_steps(case: Case, folder: Path) -> Iterator[Any]:
    import loracle
    from loracle.data import Example, Record
    from workload import FixedOrder, plan_of, start_run

    device = loracle.choose_device("auto")
    dtype = loracle.choose_dtype("auto", device=device)
    base = loracle.load_base(folder, device=device, dtype=dtype, quantization=case.packing)
    record = Record(row=0, instruction="x", input="", output="x")
    batches = [
        [
            Example(record=record, input_ids=(1,) * length, num_prompt=length // 3, truncated=False)
            for length in lengths
        ]
        for lengths in case.batches()
    ]
    plan = plan_of(base.model, _config(case, seed=0), "all-linear")
    runs = []
    for seed in range(case.runs):
        config = _config(case, seed=seed)
        name = f"run-{seed}"
        run = start_run(base, config=config, plan=plan, examples=batches[0], name=name)
        runs.append(replace(run, order=FixedOrder(batches)))
    tokens = case.pass_tokens * case.runs
    return loracle.train_bundle(
        base, runs, micro_batch_tokens=tokens, checkpointing=case.checkpointing
    )


def _peft_steps(case: Case, folder: Path) -> Iterator[Any]:
    """Stock Transformers, SDPA and PEFT under autocast, as TRL's bf16/fp16 does it; no padding."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    half = torch.cuda.get_device_capability()[0] < 8
    torch.backends.cuda.enable_cudnn_sdp(False)  # on h100 it is chosen, and wants a real card
    dtype = torch.float16 if half else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model.to("cuda").requires_grad_(False), lora).train()
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    rows = case.pass_tokens // case.tokens
    while True:
        for _ in range(case.passes):
            ids = torch.ones(rows, case.tokens, dtype=torch.int64).pin_memory()
            ids = ids.to("cuda", non_blocking=True)
            with torch.autocast("cuda", dtype=dtype):
                loss = model(input_ids=ids, labels=ids).loss / case.passes
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        yield loss


if __name__ == "__main__":
    main()
