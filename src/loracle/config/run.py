"""The configuration of a run: strict, frozen, every fault reported at once.

There is one table of defaults, ``configs/base_config.yaml``; the models below have none. A config
file holds only what differs from it, ``--set a.b=c`` only what differs from the file, and both go
through the same validation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]


Natural = Annotated[int, Field(ge=0)]


Fraction = Annotated[float, Field(gt=0, lt=1)]


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


# YAML 1.1 reads the word off as false.
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda v: "off" if v is False else v)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ColumnsConfig(_Section):
    """Names of the Alpaca fields in the source."""

    instruction: str
    """Column of the instruction."""
    input: str | None
    """Column of the optional input; null: the source has none."""
    output: str
    """Column of the response."""


class TemplateConfig(_Section):
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


class DataConfig(_Section):
    """Which records, how they are split and how they become tokens."""

    source: str
    """Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``."""
    columns: ColumnsConfig
    """Names of the Alpaca fields in the source."""
    template: Literal["alpaca"] | TemplateConfig
    """Prompt template."""
    max_records: Positive | None
    """Records used, drawn by ``split_seed``; null: all."""
    max_tokens: Annotated[int, Field(ge=8)]
    """Tokens per example, prompt and response together."""
    validation_frac: Fraction
    """Fraction of the records held out."""
    split_seed: Natural
    """Seed of the split alone."""


class PlacementConfig(_Section):
    """A placement by hand: these module kinds, in these layers, at these ranks."""

    modules: Annotated[list[str], Field(min_length=1)]
    """Last name components (``q_proj``), full module names, or patterns of full names.

    ``*`` alone is every linear layer except the head, as ``all-linear``.
    """
    layers: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Layer indices, from 0; null or absent: every layer."""
    # Not written when not given, so that runs from before it existed keep their digest.
    ranks: Annotated[dict[str, Positive], Field(min_length=1)] | None = Field(
        default=None, exclude_if=lambda ranks: ranks is None
    )
    """r of some modules, by full name, pattern, kind or ``layers:0-3,7``; null: all have ``rank``.

    The most specific key wins, in that order. alpha / r is the same for all modules.
    """


class LoraConfig(_Section):
    """The adapter."""

    placement: str | PlacementConfig
    """Preset name, or modules and layers."""
    rank: Positive
    """r, the rank of the update."""
    alpha: Annotated[float, Field(gt=0)]
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability that an element of the adapter's input is zeroed."""


class TrainConfig(_Section):
    """The optimizer and its schedule."""

    max_steps: Positive
    """Optimizer steps."""
    batch_size: Positive
    """Examples per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"]
    """Shape after the warm-up; cosine and linear end at zero."""
    warmup_frac: Annotated[float, Field(ge=0, lt=1)]
    """Fraction of max_steps over which the rate rises linearly from zero."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's decoupled decay of adapter weights."""
    beta1: Fraction
    """AdamW's decay of the first moment."""
    beta2: Fraction
    """AdamW's decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)]
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    """L2 norm to which one run's gradient is clipped; null: no clipping."""
    micro_batch_tokens: Positive
    """Tokens per forward pass; changes memory, nothing else."""
    # Not written when it is off, so that runs from before it existed keep their digest.
    gradient_checkpointing: bool = Field(default=False, exclude_if=lambda on: not on)
    """Activations inside decoder layers are computed again for the gradient instead of kept;
    changes memory and time, nothing else.
    """
    trunk: AutoOrOff
    """auto: hidden states below the lowest adapter are computed once and kept, where that pays."""


class EvalConfig(_Section):
    """What is scored, and when."""

    every_steps: Natural
    """Optimizer steps between validations; 0: only before and after."""
    max_examples: Positive | None
    """Validation examples scored; null: all."""
    batch_tokens: Positive
    """Tokens per forward pass; changes memory, nothing else."""
    generate_examples: Natural
    """Held-out instructions answered for BLEU and chrF; 0: none."""
    generate_batch_size: Positive
    """Prompts decoded together."""
    max_new_tokens: Positive
    """Tokens per answer."""


class MeasureConfig(_Section):
    """Clocks and latency."""

    skip_steps: Natural
    """Optimizer steps left out of the clocks after each start."""
    probe_steps: Annotated[int, Field(ge=2)]
    """Optimizer steps clocked alone for an arm that trains together with others."""
    latency_new_tokens: Annotated[int, Field(ge=2)]
    """Tokens decoded per latency trial."""
    latency_trials: Natural
    """Trials per variant; 0: no latency."""
    clock_rounds: Natural
    """Steps that each arm of a study takes in turn with the others, for their times; 0: none."""


class AuditConfig(_Section):
    """The run's proof of itself."""

    reload_examples: Positive
    """Examples on which the saved adapter is scored again through stock PEFT."""


class CheckpointConfig(_Section):
    """When the state is saved."""

    every_steps: Positive
    """Optimizer steps between checkpoints."""
    keep: Positive
    """Newest checkpoints kept."""


class TrackingConfig(_Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"]
    """auto: online if a key is present, else offline."""
    project: Annotated[str, Field(min_length=1)]
    """W&B project."""


class Config(_Section):
    """Everything that defines one run. Two equal configs are the same run."""

    model: Annotated[str, Field(min_length=1)]
    """Key of model_configs.yaml, or ``hub:``, ``path:``, ``pypi:``."""
    seed: Natural
    """Names the streams of order, init, dropout and sampling."""
    dtype: Dtype
    """dtype of the frozen base; auto: the best the device computes in."""
    # Not written when there is none, so that runs from before it existed keep their digest.
    quantization: Literal["nf4"] | None = Field(default=None, exclude_if=lambda kind: kind is None)
    """nf4: linear layers but the head are kept in 4 bits; another model, so another stratum."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    """Where the run computes."""
    data: DataConfig
    """Records, split and tokens."""
    lora: LoraConfig
    """The adapter."""
    train: TrainConfig
    """Optimizer and schedule."""
    eval: EvalConfig
    """Validation and generation."""
    measure: MeasureConfig
    """Clocks and latency."""
    audit: AuditConfig
    """The run's proof of itself."""
    checkpoint: CheckpointConfig
    """When the state is saved."""
    tracking: TrackingConfig
    """Weights & Biases."""

    def validates_at(self, step: int) -> bool:
        """Returns whether a validation is due after ``step`` steps; at 0, of the untuned model."""
        every = self.eval.every_steps
        return step in (0, self.train.max_steps) or (every > 0 and step % every == 0)

    @property
    def num_validations(self) -> int:
        """Validations of the tuned weights: every ``eval.every_steps`` steps and at the end."""
        return sum(map(self.validates_at, range(1, self.train.max_steps + 1)))


# Fields that say how a run is watched and kept or what is measured beside it, not what it computes.
_HOUSEKEEPING: dict[str, Any] = {"checkpoint": True, "tracking": True, "measure": {"clock_rounds"}}


def identity(config: Config) -> dict[str, Any]:
    """Returns the part of a config that decides what a run computes, as plain data."""
    return config.model_dump(mode="json", exclude=_HOUSEKEEPING)


def config_digest(config: Config) -> str:
    """Returns 12 hex digits that two configs share if they are the same run."""
    canonical = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def difference(one: Config, other: Config) -> list[str]:
    """Returns ``key: one's value -> other's value`` for each field in which two runs differ."""
    return changes(flatten(identity(one)), flatten(identity(other)))


def changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns ``key: one's value -> other's value`` for each key in which two mappings differ."""
    return [
        f"{key}: {one.get(key)!r} -> {other.get(key)!r}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
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
    """Returns the steps that a probe takes, those before the clock starts included."""
    return config.measure.skip_steps + config.measure.probe_steps
