"""What `loracle plan` says beside memory that others measured, with what explains the difference.

    python benchmarks/plan_published.py > docs/plans/published.md

The shapes are theirs: every sequence as long as their limit, as their padded batches are at most.
Nothing is run; a row takes some seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from loracle.config.files import load_config
from loracle.forecast.devices import DEVICES
from loracle.forecast.meta_base import model_without_weights
from loracle.forecast.predict import GRANULE, dtype_on, runtime_gib
from loracle.forecast.trace import synthetic_examples, trace_step
from loracle.model.inventory import inventory_from_architecture
from loracle.placement import resolve_placement
from loracle.sources import catalog
from loracle.text import GIB

_GB = 1e9


@dataclass(frozen=True)
class Published:
    """A figure that somebody published."""

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
    """What explains the difference."""


# source: Lightning-AI/litgpt, config_hub/finetune/README.md (A10G, Alpaca2k, at most 512 tokens)
# and tutorials/resource-tables.md (A100-40GB SXM, 2023-10-20, Alpaca, at most 1304 tokens);
# PyTorch blog, 2024-01-10, "Finetune LLMs on your own consumer hardware" (T4, bitsandbytes);
# huggingface/peft, method_comparison/MetaMathQA, 5d602fdb (L40S, at most 768 tokens, batches of 4);
# pytorch/torchtune, README (RTX 4090, packed sequences of 2048, compiled; Llama-3.1-8B, which has
# Llama-3's shapes). Of the L40S only the runtime's share matters here, and it is taken to be
# the L4's.
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
What `loracle plan` says of a step, beside what others measured of theirs. Theirs is their code and
ours is ours: the head in pieces, no padding, and less kept for the gradient. So ours mostly
comes out lower, the more so the longer the sequences; adapters and optimizer are in fp32 here. GB
is 1e9 bytes. Regenerate with `python benchmarks/plan_published.py`.
"""


def main() -> int:
    print(_INTRODUCTION)
    print("| who | model | placement | batch | settings | theirs, GB | ours, GB | why |")
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
    """Returns what a step of that shape takes of a GPU, runtime included, in 1e9 bytes."""
    tokens = row.sequences * row.tokens
    overrides = [f"model={row.model}", f"train.micro_batch_tokens={tokens}", *row.settings]
    overrides += [f"data.max_tokens={row.tokens}", f"lora.rank={row.rank}"]
    return _step_gb(row, overrides) + runtime_gib(DEVICES[row.gpu]) * GIB / _GB


def _step_gb(row: Published, overrides: Sequence[str]) -> float:
    config, device = load_config(overrides=overrides), DEVICES[row.gpu]
    architecture = catalog().models[row.model].architecture
    plan = resolve_placement(
        row.placement,
        inventory=inventory_from_architecture(architecture),
        rank=row.rank,
        alpha=config.lora.alpha,
    )
    with model_without_weights(
        architecture,
        plan=plan,
        device=device,
        dtype=dtype_on(device, requested=config.dtype),
        dropout=config.lora.dropout,
        quantization=config.quantization,
    ) as (base, adapter):
        # Their losses are over every position, or ours would look better than they are.
        examples = synthetic_examples([(1, row.tokens - 1)] * row.sequences)
        found = trace_step(base, adapter=adapter, config=config, examples=examples, granule=GRANULE)
    return found.peak / _GB


if __name__ == "__main__":
    sys.exit(main())
