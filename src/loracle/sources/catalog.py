"""The models and data that have a key: ``configs/model_configs.yaml``, read strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from loracle.config.files import read_yaml, shipped_config, validate
from loracle.config.run import Positive, Section
from loracle.errors import SourceError, did_you_mean
from loracle.sources.spec import parse_source

Kind = Literal["model", "data"]
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]


class Profile(Section):
    """Settings of a model on a device; an absent one is left as in the configuration."""

    dtype: Literal["bfloat16", "float16"] | None = None
    """dtype of the base: one in which the device multiplies."""
    quantization: Literal["nf4"] | None = None
    """Makes another model of the base, so it is only set on request."""
    gradient_checkpointing: bool | None = None
    """Changes memory and time, nothing else."""
    micro_batch_tokens: Positive | None = None
    """Tokens per forward pass; changes memory, nothing else."""
    batch_tokens: Positive | None = None
    """Tokens per pass of a validation; changes memory, nothing else."""
    generate_batch_size: Positive | None = None
    """Prompts decoded together."""

    def changes(self) -> dict[str, Any]:
        """Returns its settings by the configuration's keys."""
        keys = {
            "dtype": "dtype",
            "quantization": "quantization",
            "gradient_checkpointing": "train.gradient_checkpointing",
            "micro_batch_tokens": "train.micro_batch_tokens",
            "batch_tokens": "eval.batch_tokens",
            "generate_batch_size": "eval.generate_batch_size",
        }
        given = {key: getattr(self, name) for name, key in keys.items()}
        return {key: value for key, value in given.items() if value is not None}


class _Sourced(Section):
    source: str
    """``hub:``, ``path:`` or ``pypi:`` string with its revision or hash."""

    @field_validator("source")
    @classmethod
    def _parses(cls, source: str) -> str:
        try:
            parse_source(source)
        except SourceError as error:
            raise ValueError(str(error)) from None
        return source


class ModelEntry(_Sourced):
    """A model that has a key."""

    dtype: Literal["float32", "bfloat16", "float16"]
    """dtype of the stored weights."""
    profiles: dict[Key, Profile] = Field(default_factory=dict)
    """Settings by device."""
    architecture: dict[str, Any]
    """Transformers configuration, complete enough to count every parameter."""

    @field_validator("architecture")
    @classmethod
    def _names_its_type(cls, architecture: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(architecture.get("model_type"), str):
            raise ValueError("must name its model_type")
        return architecture


class DataShapeEntry(Section):
    """Number and lengths of a data set's examples, for predictions."""

    records: Positive
    """Total records."""
    prompt_tokens: Annotated[float, Field(gt=0)]
    """Mean per example."""
    response_tokens: Annotated[float, Field(gt=0)]
    """Mean per example, EOS included."""
    basis: str
    """Source of these numbers."""


class DataEntry(_Sourced):
    """A data set that has a key."""

    shape: DataShapeEntry
    """Number and lengths of its examples in the standard prompt."""


class Catalog(Section):
    """Every model and data set that has a key."""

    models: dict[Key, ModelEntry]
    """Models by key."""
    data: dict[Key, DataEntry]
    """Data sets by key."""


@lru_cache(maxsize=1)
def catalog() -> Catalog:
    """Returns the shipped ``model_configs.yaml``.

    Raises:
        ConfigError: If the file is missing or not valid.
    """
    path = shipped_config("model_configs")
    return validate(Catalog, read_yaml(path), origin=path.name)


def source_of(text: str, *, kind: Kind) -> str:
    """Returns the source string of a key; a source string is returned unchanged.

    Raises:
        SourceError: If ``text`` is neither; names the nearest key.
    """
    if ":" in text:
        return text
    entries: Mapping[str, _Sourced] = catalog().models
    others: Mapping[str, _Sourced] = catalog().data
    if kind == "data":
        entries, others = others, entries
    if text in entries:
        return entries[text].source
    raise SourceError(
        f"{kind} '{text}': no such key (there are {', '.join(entries)}), "
        f"and no hub:, path: or pypi: source{_hint(text, kind, entries, others)}"
    )


def _hint(text: str, kind: Kind, entries: Iterable[str], others: Iterable[str]) -> str:
    if text in others:
        return f"; '{text}' names {'data' if kind == 'model' else 'a model'}"
    if text.startswith((".", "/", "~")):
        return f"; did you mean 'path:{text}'?"
    if text.count("/") == 1:
        return f"; did you mean 'hub:{text}' or 'path:{text}'?"
    return did_you_mean(text, entries)
