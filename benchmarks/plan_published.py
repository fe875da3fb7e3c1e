"""Memory as `loracle plan` predicts it beside published measurements, with the reasons to differ.

    python benchmarks/plan_published.py > docs/plans/published.md

The shapes are the publications': every sequence as long as the limit, the most that their padded
batches reach. Nothing is run; a row takes a few seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from loracle.config.files import load_config
from loracle.forecast.devices import DEVICES
from loracle.forecast.predict import dtype_on, runtime_gib
from loracle.sources import catalog
from loracle.text import GIB
from predicted import predicted_step

_GB = 1e9


@dataclass(frozen=True)
class Published:
    """A published measurement."""

    who: str
    model: str
    gpu: str
    placement: str
    rank: int
    sequences: int
    tokens: int
    settings: tuple[str, ...]
    published_gb: float
    """1e9 bytes."""
    why: str
    """Reasons for the difference."""


# source: Lightning-AI/litgpt, config_hub/finetune/README.md (A10G, Alpaca2k, at most 512 tokens)
# and tutorials/resource-tables.md (A100-40GB SXM, 2023-10-20, Alpaca, at most 1304 tokens);
# PyTorch blog, 2024-01-10, "Finetune LLMs on your own consumer hardware" (T4, bitsandbytes);
# huggingface/peft, method_comparison/MetaMathQA, 5d602fdb (L40S, at most 768 tokens, batches of 4);
# pytorch/torchtune, README (RTX 4090, packed sequences of 2048, compiled; Llama-3.1-8B, which has
# Llama-3's shapes). Of the L40S only the runtime's share matters here; the L4's is assumed.
ROWS = (
    Published(
        "litgpt", "llama-2-7b", "a100-40", "attention-qv", 8, 1, 1304, ("dtype=bfloat16",), 21.30,
        "its logits of all 1304 positions in fp32, and PEFT-like intermediate copies",
    ),
    Published(
        "litgpt", "llama-2-7b", "a100-40", "attention-qv", 8, 2, 1304, ("dtype=bfloat16",), 29.07,
        "as above, twice the tokens",
    ),
    Published(
        "litgpt", "llama-2-7b", "a100-40", "attention-qv", 8, 1, 1304,
        ("dtype=bfloat16", "quantization=nf4"), 14.14,
        "as above; it keeps single block scales, we pack them too",
    ),
    Published(
        "litgpt", "llama-2-7b", "l4", "attention-qv", 32, 2, 512, ("dtype=bfloat16",), 19.77,
        "its loss is over the prompt too; padded to the longest of the batch",
    ),
    Published(
        "litgpt", "llama-2-7b", "l4", "attention-qv", 32, 2, 512,
        ("dtype=bfloat16", "quantization=nf4"), 13.68, "as above",
    ),
    Published(
        "litgpt", "mistral-7b", "l4", "attention-qv", 32, 2, 512, ("dtype=bfloat16",), 20.66,
        "as for Llama",
    ),
    Published(
        "PyTorch blog", "llama-2-7b", "t4", "attention-qv", 16, 4, 512,
        ("dtype=float16", "quantization=nf4", "train.gradient_checkpointing=true"), 7.0,
        "theirs are round figures; their rank and placement are not stated, ours are guesses",
    ),
    Published(
        "PyTorch blog", "llama-2-7b", "t4", "attention-qv", 16, 4, 1024,
        ("dtype=float16", "quantization=nf4", "train.gradient_checkpointing=true"), 10.0,
        "as above",
    ),
    Published(
        "PEFT", "llama-3.2-3b", "l4", "attention-qv", 32, 4, 768, ("dtype=bfloat16",), 22.29,
        "what its allocator reserved at most, over 50 answers at once too, and all logits of "
        "128,256 words in fp32",
    ),
    Published(
        "PEFT", "llama-3.2-3b", "l4", "feed-forward", 10, 4, 768, ("dtype=bfloat16",), 24.70,
        "as above; feed-forward over q,v is +2.41 there",
    ),
    Published(
        "torchtune", "llama-3-8b", "rtx4090", "all-linear", 8, 2, 2048,
        ("dtype=bfloat16", "train.gradient_checkpointing=true"), 16.2 * GIB / _GB,
        "its adapters and optimizer are in bf16 and its step is compiled; rank, placement and "
        "checkpointing are guesses",
    ),
    Published(
        "torchtune", "llama-3-8b", "rtx4090", "all-linear", 8, 2, 2048,
        ("dtype=bfloat16", "quantization=nf4", "train.gradient_checkpointing=true"),
        7.4 * GIB / _GB, "as above",
    ),
)  # fmt: skip

_INTRODUCTION = """\
The memory of a step as `loracle plan` predicts it for our engine, beside published measurements of
other code. Ours computes the head in pieces, pads nothing, and stores less for the gradient. So it
is mostly lower, more so for longer sequences; its adapters and optimizer are in fp32. GB is 1e9
bytes. Regenerate with `python benchmarks/plan_published.py`.
"""


def main() -> int:
    print(_INTRODUCTION)
    print("| source | model | placement | batch | settings | published, GB | ours, GB | why |")
    print("| --- | --- | --- | --- | --- | ---: | ---: | --- |")
    for row in ROWS:
        settings = ", ".join(setting.partition("=")[2] for setting in row.settings)
        if "train.gradient_checkpointing=true" in row.settings:
            settings = settings.replace("true", "checkpointing")
        print(
            f"| {row.who} | {row.model} | {row.placement} r {row.rank} | {row.sequences} x "
            f"{row.tokens} | {settings} | {row.published_gb:.2f} | {ours_gb(row):.2f} | {row.why} |"
        )
    return 0


def ours_gb(row: Published) -> float:
    """Returns the predicted GPU memory of a step of that shape, in 1e9 bytes."""
    tokens, device = row.sequences * row.tokens, DEVICES[row.gpu]
    overrides = [f"model={row.model}", f"train.micro_batch_tokens={tokens}", *row.settings]
    overrides += [f"data.max_tokens={row.tokens}", f"lora.rank={row.rank}"]
    config = load_config(overrides=[*overrides, f"lora.placement={row.placement}"])
    step = predicted_step(
        catalog().models[row.model].architecture,
        config=config,
        device=device,
        dtype=dtype_on(device, requested=config.dtype),
        # The loss is over every position, as in the publications, or ours would look too low.
        lengths=[(1, row.tokens - 1)] * row.sequences,
    )
    return (step.peak + runtime_gib(device) * GIB) / _GB


if __name__ == "__main__":
    sys.exit(main())
