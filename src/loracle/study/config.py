"""The configuration of a study: a question, a base, arms that differ in placement, seeds.

A study file states once, for all arms, what differs from the base configuration (``config``), and
each arm's placement. Any other change in an arm is a confound and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from loracle.config.run import Config, Fraction, Natural, PlacementConfig, Positive, Section
from loracle.errors import did_you_mean
from loracle.placement.budget import Budget
from loracle.placement.plan import FULL
from loracle.placement.selection import Score
from loracle.text import slug_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.,+@-]{0,39}")


class StrategicConfig(Section):
    """The modules that score best on a few training batches of the frozen base."""

    strategic: Score
    """Score of a module; see `loracle.model.scores`."""
    keep_frac: Fraction
    """Fraction of the linear layers that get an adapter."""


class RandomConfig(Section):
    """Modules drawn at random: the control that tells a good choice from a lucky one."""

    random: Natural
    """Seed of the draw."""
    keep_frac: Fraction
    """Fraction of the linear layers that get an adapter."""


class NoiseConfig(Section):
    """Runs of the reference arm that measure noise and count in no comparison."""

    repeats: Natural = 0
    """Times that its first seed is run again."""
    extra_seeds: list[Natural] = Field(default_factory=list)
    """Seeds that only it has."""


class SearchConfig(Section):
    """A grid of learning rates, tried for every arm before the comparison."""

    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2)]
    """Peak rates; each arm uses the one with its lowest validation loss."""
    seed: Natural
    """Seed of the trial runs; must not be one of the study's."""


class FullConfig(Section):
    """Full fine-tuning, a reference beside the arms."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak rate; about a tenth of LoRA's (Schulman et al. 2025, LoRA Without Regret)."""


def _kind_of_placement(given: Any) -> str:
    """Returns the form in which a placement is stated, so that errors refer to that form only."""
    if isinstance(given, BaseModel):
        return type(given).__name__
    if not isinstance(given, Mapping):
        return "str"
    if "strategic" in given:
        return "StrategicConfig"
    return "RandomConfig" if "random" in given else "PlacementConfig"


class ArmConfig(Section):
    """A placement under test."""

    placement: Annotated[
        Annotated[str, Tag("str")]
        | Annotated[PlacementConfig, Tag("PlacementConfig")]
        | Annotated[StrategicConfig, Tag("StrategicConfig")]
        | Annotated[RandomConfig, Tag("RandomConfig")],
        Discriminator(_kind_of_placement),
    ]
    """A preset, modules and layers, or a rule that chooses them."""
    rank: Positive | None = None
    """r, where the budget is not to decide it; null: the budget decides."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Anything else that it would change, as dotted keys; refused if it changes something."""


class StudyConfig(Section):
    """A study as its file states it."""

    question: Annotated[str, Field(min_length=1)]
    """The question that the study answers, in one sentence."""
    base: str = "base_config"
    """A configuration file beside the study's or anywhere, or the name of a shipped one."""
    config: dict[str, Any] = Field(default_factory=dict)
    """What all runs have different from the base, as a configuration file would say it."""
    reference: str
    """Name of the arm that the others are compared with."""
    budget: Budget
    """What is equal for all arms: the rank, or the number of trainable parameters."""
    seeds: Annotated[list[Natural], Field(min_length=1)]
    """Seeds of every arm."""
    interval: Annotated[float, Field(gt=0.5, lt=1)] | None = 0.95
    """Coverage of the intervals, over seeds and examples; null: none, for a single seed."""
    noise: NoiseConfig = NoiseConfig()
    """Runs that measure noise."""
    search: SearchConfig | None = None
    """A grid of learning rates; null: every arm uses the base's."""
    full: FullConfig | None = None
    """Settings of full fine-tuning; required if an arm's placement is ``full``."""
    arms: Annotated[dict[str, ArmConfig], Field(min_length=2)]
    """The placements under test, by name."""

    @field_validator("arms", mode="before")
    @classmethod
    def _spelled_out(cls, arms: Any) -> Any:
        """Expands ``name: preset`` and ``name:`` (a preset of that name) to the long form."""
        if not isinstance(arms, Mapping):
            return arms
        return {name: _arm(name, given) for name, given in arms.items()}

    @model_validator(mode="after")
    def _is_sound(self) -> StudyConfig:
        faults = [*self._bad_names(), *self._bad_seeds(), *self._bad_full()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _bad_names(self) -> list[str]:
        faults = [
            f"arms.{name}: an arm's name has 1 to 40 letters, digits, blanks and _ . , + @ -"
            for name in self.arms
            if not _NAME.fullmatch(name)
        ]
        slugs = [slug_of(name) for name in self.arms]
        faults += [
            f"arms.{name}: another arm's name differs from it in punctuation only"
            for name, slug in zip(self.arms, slugs, strict=True)
            if slugs.count(slug) > 1
        ]
        if self.reference not in self.arms:
            hint = did_you_mean(self.reference, self.arms)
            faults.append(f"reference: no arm is called '{self.reference}'{hint}")
        return faults

    def _bad_full(self) -> list[str]:
        names = [name for name, arm in self.arms.items() if arm.placement == FULL]
        if len(names) > 1:
            return [f"arms.{names[1]}: the same as arms.{names[0]}"]
        if names and self.full is None:
            missing = "full: missing; full fine-tuning needs a learning rate of its own, about a "
            return [missing + "tenth of LoRA's: full: {learning_rate: ...}"]
        if names == [self.reference]:
            return [f"reference: '{self.reference}' has no adapters to match; choose another arm"]
        return []

    def _bad_seeds(self) -> list[str]:
        named = {"seeds": self.seeds, "noise.extra_seeds": self.noise.extra_seeds}
        faults = [f"{key}: a seed is given twice" for key, s in named.items() if len({*s}) < len(s)]
        if self.interval is not None and len(self.seeds) == 1:
            faults.append(
                "seeds: an interval over seeds needs at least 2; give more, or 'interval: null'"
            )
        if self.interval is None and len(self.seeds) > 1:
            faults.append(
                f"interval: null is for a single seed, and seeds has {len(self.seeds)}; leave it "
                "out, or give its coverage, e.g. 0.95"
            )
        taken = sorted(set(self.seeds) & set(self.noise.extra_seeds))
        if taken:
            faults.append(f"noise.extra_seeds: {taken[0]} is one of seeds already")
        if self.search and self.search.seed in {*self.seeds, *self.noise.extra_seeds}:
            faults.append("search.seed: the comparison uses it; choose another")
        return faults


def _arm(name: Any, given: Any) -> Any:
    if given is None:
        return {"placement": name}
    if isinstance(given, str):
        return {"placement": given}
    if not isinstance(given, Mapping):
        return given
    own: dict[Any, Any] = {"placement": name}
    changes: dict[str, Any] = {}
    for key, value in given.items():
        full = None if key in ArmConfig.model_fields else _config_key(str(key))
        if full is None:
            own[key] = value
        else:
            changes[full] = value
    return own | ({"config": changes} if changes else {})


def _config_key(key: str) -> str | None:
    """Returns the dotted key of a run's configuration for a key of an arm; None if there is none.

    ``learning_rate`` means ``train.learning_rate``, so that a confound is refused by its full name
    in either spelling.
    """
    if "." in key or key in Config.model_fields:
        return key
    for section, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
            return f"{section}.{key}"
    return None
