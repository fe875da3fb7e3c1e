"""The model card beside a saved adapter: what it was trained on, how well it does, how to load it.

It names the base by its source, which is valid on every machine; ``adapter_config.json`` names the
folder in which this machine has it, because stock tools take nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loracle.config.run import Config
from loracle.placement import ModulePlan
from loracle.records.result import ModelQuality, RunResult
from loracle.sources import ResolvedSource
from loracle.version import __version__

_LOADING = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("ADAPTER", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("ADAPTER")
```
"""
_ELSEWHERE = """
`adapter_config.json` names the folder in which the base lay where this was trained. On another
machine, load the base yourself and put the adapter on it:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE", dtype="{dtype}")
model = PeftModel.from_pretrained(base, "ADAPTER")
```
"""
_PACKED = """
The base was packed in 4 bits ({quantization}) while this was trained. Loaded as above it is not,
and its losses are others; pass `quantization_config` to load it as it was.
"""


def adapter_card(
    result: RunResult, *, config: Config, plan: ModulePlan, base: ResolvedSource
) -> str:
    """Returns the Markdown of the model card of a finished run's adapter.

    Args:
        result: The run's result.
        config: Its configuration.
        plan: The modules it adapted.
        base: The base model, as it was resolved.
    """
    name, revision = base.stock_name
    is_on_hub = revision is not None
    dtype = _item(result.signature, "dtype").partition("+")[0]
    front = {
        "base_model": name if is_on_hub else base.source,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loracle"],
    }
    parts = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# LoRA adapter: {_plain(result.arm)}",
        "",
        *_table(_facts(result, config=config, plan=plan, base=base)),
        "",
        "## Measured",
        "",
        *_quality(result),
        "",
        "## Loading it",
        "",
        _LOADING.format(dtype=dtype),
    ]
    if not is_on_hub:
        parts.append(_ELSEWHERE.format(dtype=dtype).lstrip("\n"))
    if config.quantization:
        parts.append(_PACKED.format(quantization=config.quantization).lstrip("\n"))
    return "\n".join(parts)


def _facts(
    result: RunResult, *, config: Config, plan: ModulePlan, base: ResolvedSource
) -> Mapping[str, Any]:
    cost, train = result.efficiency, config.train
    return {
        "base": f"{_code(base.source)}, {_code(base.revision)}",
        "placement": f"{_code(plan.placement)}, {len(plan.modules)} modules",
        "rank": _span(module.rank for module in plan.modules),
        "alpha": _span(module.alpha for module in plan.modules),
        "dropout": f"{config.lora.dropout:g}",
        "trained": f"{cost.trainable_params:,} of {cost.total_params:,} parameters",
        "steps": f"{train.max_steps:,} of {train.batch_size} examples, "
        f"learning rate {train.learning_rate:g}, seed {config.seed}",
        "data": f"{_code(config.data.source)}, at most {config.data.max_tokens} tokens",
        "signature": _code(result.signature),
        "made with": f"LoRAcle {__version__}",
    }


def _quality(result: RunResult) -> list[str]:
    base, tuned = result.quality.base, result.quality.tuned
    rows = {
        "loss, nats per token": ("loss_nats_per_token", ".4f"),
        "perplexity": ("perplexity", ".3f"),
        "BLEU": ("bleu", ".2f"),
        "chrF": ("chrf", ".2f"),
    }
    return [
        f"On {tuned.num_examples} held-out examples, {tuned.num_targets:,} tokens.",
        "",
        "| | base | with this adapter |",
        "| --- | ---: | ---: |",
        *(
            f"| {title} | {_figure(base, key, form)} | {_figure(tuned, key, form)} |"
            for title, (key, form) in rows.items()
        ),
    ]


def _figure(quality: ModelQuality, key: str, form: str) -> str:
    value = getattr(quality, key)
    return "n/a" if value is None else format(value, form)


def _table(facts: Mapping[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())]


def _span(values: Iterable[float]) -> str:
    ordered = sorted(set(values))
    ends = [f"{value:g}" for value in (ordered[0], ordered[-1])]
    return ends[0] if len(ordered) == 1 else " to ".join(ends)


def _item(signature: str, key: str) -> str:
    return next(item[len(key) + 1 :] for item in signature.split("|") if item.startswith(f"{key}:"))


def _code(text: str) -> str:
    """Returns a text as inert code in a table's cell."""
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """Returns a text in one line, without what Markdown, HTML or a terminal would act on."""
    return re.sub(r"[^\w .,:;/@=+~%()#-]", " ", " ".join(text.split()))
