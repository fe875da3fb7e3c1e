"""The configuration of a run: strict, frozen, every fault reported at once.

The models below have no defaults: ``configs/base_config.yaml`` is the one table of them. A config
file holds only differences from it, ``--set a.b=c`` only differences from the file. A field with
``exclude_if`` is not written at that value, so that runs older than the field keep their digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from loracle.config.bleu import Tokenizer

Positive = Annotated[int, Field(gt=0, lt=2**31)]  # assumed: no run counts beyond 32 bits
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A mapping in a YAML file: strict, frozen, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ColumnsConfig(Section):
    """Names of the Alpaca fields in the source."""

    instruction: str
    """Column of the instruction."""
    input: str | None
    """Column of the optional input; null if the source has none."""
    output: str
    """Column of the response."""


class TemplateConfig(Section):
    """A prompt template in two forms; ``{instruction}`` and ``{input}`` are filled in."""

    with_input: str
    """Prompt of a record that has an input."""
    without_input: str
    """Prompt of a record that has none."""

    @model_validator(mode="after")
    def _names_its_fields(self) -> TemplateConfig:
        for form, needed in (
            ("with_input", ("{instruction}", "{input}")),
            ("without_input", ("{instruction}",)),
        ):
            missing = [field for field in needed if field not in getattr(self, form)]
            if missing:
                raise ValueError(f"{form} must contain {' and '.join(missing)}")
        return self


class DataConfig(Section):
    """Selection, split and tokenisation of the records."""

    source: str
    """Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``."""
    columns: ColumnsConfig
    """Names of the Alpaca fields in the source."""
    template: Literal["alpaca"] | TemplateConfig
    """Prompt template."""
    max_records: Positive | None
    """Number of records used, drawn by ``split_seed``; null for all."""
    max_tokens: Annotated[int, Field(ge=8)]
    """Most tokens of an example, prompt and response together."""
    validation_frac: Fraction
    """Fraction of the records held out for validation."""
    split_seed: Natural
    """Seed of the split only."""


class PlacementConfig(Section):
    """A custom placement: module kinds, layers and ranks."""

    modules: Annotated[list[str], Field(min_length=1)]
    """Last name components (``q_proj``), full module names, or patterns of full names.

    ``*`` alone selects every linear layer except the head, as ``all-linear`` does.
    """
    layers: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Layer indices, from 0; null or absent for every layer."""
    ranks: Annotated[dict[str, Positive], Field(min_length=1)] | None = Field(
        default=None, exclude_if=lambda ranks: ranks is None
    )
    """r by full name, pattern, kind or ``layers:0-3,7``; null if all modules have ``rank``.

    The most specific key wins, in that order. alpha / r is the same for all modules.
    """


class LoraConfig(Section):
    """The adapter."""

    placement: str | PlacementConfig
    """Preset name, or modules and layers."""
    rank: Positive
    """r, the rank of the update."""
    alpha: Annotated[float, Field(gt=0)]
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability that an element of the adapter's input is zeroed."""


class TrainConfig(Section):
    """Optimizer and schedule."""

    max_steps: Positive
    """Optimizer steps."""
    batch_size: Positive
    """Examples per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"]
    """Shape of the learning rate after the warm-up; cosine and linear end at zero."""
    warmup_frac: Annotated[float, Field(ge=0, lt=1)]
    """Fraction of max_steps over which the learning rate rises linearly from zero."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's decoupled weight decay of the adapter."""
    beta1: Fraction
    """AdamW's decay of the first moment."""
    beta2: Fraction
    """AdamW's decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)]
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    """L2 norm to which a run's gradient is clipped; null for no clipping."""
    micro_batch_tokens: Positive
    """Most tokens per forward pass; affects memory only."""
    gradient_checkpointing: bool = Field(default=False, exclude_if=lambda on: not on)
    """Recomputes activations for the gradient, not stored; affects memory and time only."""
    trunk: Literal["auto", "off"]
    """auto: hidden states below the lowest adapter are computed once and cached, if that pays."""


class EvalConfig(Section):
    """Validation and generation."""

    every_steps: Natural
    """Optimizer steps between validations; 0 for only before and after training."""
    max_examples: Positive | None
    """Number of validation examples scored; null for all."""
    batch_tokens: Positive
    """Most tokens per forward pass; affects memory only."""
    generate_examples: Natural
    """Number of held-out instructions answered for BLEU and chrF; 0 for none."""
    generate_batch_size: Positive
    """Number of prompts decoded together."""
    max_new_tokens: Positive
    """Most tokens per answer."""
    bleu_tokenize: Tokenizer = Field(default="auto", exclude_if=lambda name: name == "auto")
    """sacreBLEU's tokenizer of BLEU; auto: by the script of the references."""


class MeasureConfig(Section):
    """Timing and latency."""

    skip_steps: Natural
    """Optimizer steps excluded from timing after each start."""
    probe_steps: Annotated[int, Field(ge=2)]
    """Optimizer steps timed alone for an arm that trains together with others."""
    latency_new_tokens: Annotated[int, Field(ge=2)]
    """Tokens decoded per latency trial."""
    latency_trials: Natural
    """Trials per variant; 0 for no latency."""
    clock_rounds: Natural
    """Timed steps of each arm of a study, the arms alternating; 0 for none."""


class AuditConfig(Section):
    """The check of a finished run."""

    reload_examples: Positive
    """Number of examples scored again with the saved adapter through stock PEFT."""


class CheckpointConfig(Section):
    """Saving of the training state."""

    every_steps: Positive
    """Optimizer steps between checkpoints."""
    keep: Positive
    """Number of newest checkpoints kept."""


class TrackingConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"]
    """auto: online if an API key is present, else offline."""
    project: Annotated[str, Field(min_length=1)]
    """W&B project."""


def _device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError("must be auto, cpu, cuda, or cuda:N for GPU number N")
    return device


class Config(Section):
    """Everything that defines one run. Two equal configs are the same run."""

    model: Annotated[str, Field(min_length=1)]
    """Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``."""
    seed: Natural
    """Seed of the random streams for order, init, dropout and sampling."""
    dtype: Dtype
    """dtype of the frozen base; auto: the best one the device supports."""
    quantization: Literal["nf4"] | None = Field(default=None, exclude_if=lambda kind: kind is None)
    """nf4: linear layers except the head in 4 bits; another model, so another stratum."""
    device: Annotated[str, AfterValidator(_device)]
    """auto, cpu, cuda or cuda:N."""
    deterministic: bool | None = Field(default=None, exclude_if=lambda wanted: wanted is None)
    """true: a repeated run ends with the same bits; null: true, unless known to cost much."""
    data: DataConfig
    """Records, split and tokens."""
    lora: LoraConfig
    """The adapter."""
    train: TrainConfig
    """Optimizer and schedule."""
    eval: EvalConfig
    """Validation and generation."""
    measure: MeasureConfig
    """Timing and latency."""
    audit: AuditConfig
    """Check of the finished run."""
    checkpoint: CheckpointConfig
    """Saving of the training state."""
    tracking: TrackingConfig
    """Weights & Biases."""

    def validates_at(self, step: int) -> bool:
        """Returns whether a validation is due after ``step`` steps; at 0, of the untuned model."""
        every = self.eval.every_steps
        return step in (0, self.train.max_steps) or (every > 0 and step % every == 0)

    @property
    def num_validations(self) -> int:
        """Validations of the tuned weights: every ``eval.every_steps`` steps and at the end."""
        steps, every = self.train.max_steps, self.eval.every_steps
        return -(-steps // every) if every else 1


# Fields that decide how a run is tracked, saved or timed, not what it computes.
_HOUSEKEEPING: dict[str, Any] = {"checkpoint": True, "tracking": True, "measure": {"clock_rounds"}}


def identity(config: Config) -> dict[str, Any]:
    """Returns the fields of a config that decide what a run computes, as plain data."""
    return config.model_dump(mode="json", exclude=_HOUSEKEEPING)


def config_digest(config: Config) -> str:
    """Returns 12 hex digits, equal for configs of the same run."""
    canonical = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def difference(a: Config, b: Config) -> list[str]:
    """Returns ``key: value in a -> value in b`` for each field in which two runs differ."""
    return changes(flatten(identity(a)), flatten(identity(b)))


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns ``key: value in a -> value in b`` for each key in which two mappings differ."""
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def flatten(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, prefix=f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def num_probed_steps(config: Config) -> int:
    """Returns the optimizer steps of a probe, those before timing starts included."""
    return config.measure.skip_steps + config.measure.probe_steps
