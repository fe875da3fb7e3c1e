"""The models and data that have a key: ``configs/model_configs.yaml``, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from loracle.config.files import read_yaml, shipped_config
from loracle.config.run import Positive
from loracle.errors import ConfigError, SourceError, did_you_mean
from loracle.sources.spec import parse_source

Kind = Literal["model", "data"]
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]


class _Entry(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Profile(_Entry):
    """What a device needs set differently for a model; absent: as the configuration has it."""

    dtype: Literal["bfloat16", "float16"] | None = None
    """Of the base: what the device multiplies."""
    quantization: Literal["nf4"] | None = None
    """Of the base; it makes another model of it, so it is never set unless asked for."""
    gradient_checkpointing: bool | None = None
    """Changes memory and time, nothing else."""
    micro_batch_tokens: Positive | None = None
    """Tokens per forward pass; changes memory, nothing else."""
    batch_tokens: Positive | None = None
    """Tokens per pass of a validation; changes memory, nothing else."""
    generate_batch_size: Positive | None = None
    """Prompts decoded together."""

    def changes(self) -> dict[str, Any]:
        """Returns what it sets, by the configuration's keys."""
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


class _Sourced(_Entry):
    source: str
    """``hub:``, ``path:`` or ``pypi:`` string; the revision or hash is part of it."""

    @field_validator("source")
    @classmethod
    def _parses(cls, source: str) -> str:
        try:
            parse_source(source)
        except SourceError as error:
            raise ValueError(str(error)) from None
        return source


class ModelEntry(_Sourced):
    """A model that can be named by its key."""

    dtype: Literal["float32", "bfloat16", "float16"]
    """dtype in which the weights are stored."""
    profiles: dict[Key, Profile] = {}
    """Settings by device."""
    architecture: dict[str, Any]
    """Transformers configuration: enough to count every parameter without the weights."""

    @field_validator("architecture")
    @classmethod
    def _names_its_type(cls, architecture: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(architecture.get("model_type"), str):
            raise ValueError("must name its model_type")
        return architecture


class DataShapeEntry(_Entry):
    """How long the examples of a data set are: what planning needs to know of it."""

    records: Positive
    """Records in all."""
    prompt_tokens: Annotated[float, Field(gt=0)]
    """Per example, on average."""
    response_tokens: Annotated[float, Field(gt=0)]
    """Per example, on average, EOS included."""
    basis: str
    """Where that is from."""


class DataEntry(_Sourced):
    """A data set that can be named by its key."""

    shape: DataShapeEntry
    """Of its examples, in the standard prompt."""


class Catalog(_Entry):
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
    return parse_catalog(read_yaml(path), origin=path.name)


def parse_catalog(tree: Mapping[str, Any], *, origin: str) -> Catalog:
    """Returns ``tree`` validated; ``origin`` names it in messages.

    Raises:
        ConfigError: Listing every fault.
    """
    try:
        return Catalog.model_validate(tree)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise ConfigError(f"{origin}: " + "; ".join(faults)) from None


def source_of(text: str, *, kind: Kind) -> str:
    """Returns the source string behind a key; a source string is returned as it is.

    Raises:
        SourceError: If ``text`` is neither; names the nearest key.
    """
    if ":" in text:
        return text
    known = catalog()
    entries: Mapping[str, _Sourced] = known.models if kind == "model" else known.data
    if text in entries:
        return entries[text].source
    raise SourceError(
        f"{kind} '{text}': no such key (there are {', '.join(entries)}), "
        f"and no hub:, path: or pypi: source{_hint(text, kind=kind, entries=entries)}"
    )


def _hint(text: str, *, kind: Kind, entries: Mapping[str, _Sourced]) -> str:
    other: Mapping[str, _Sourced] = catalog().data if kind == "model" else catalog().models
    if text in other:
        return f"; '{text}' names {'data' if kind == 'model' else 'a model'}"
    if text.startswith((".", "/", "~")):
        return f"; did you mean 'path:{text}'?"
    if text.count("/") == 1:
        return f"; did you mean 'hub:{text}' or 'path:{text}'?"
    return did_you_mean(text, entries)
