"""Settings under which a run fits a device: the mathematics stays, the cheapest comes first.

First smaller passes, then gradient checkpointing, which change memory and time and no figure; then
a base in 4 bits, which is another model and is said to be one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loracle.config import Config
from loracle.configfile import merge, nested, parse_config
from loracle.errors import UsageError
from loracle.placement.plan import FULL
from loracle.plan.arms import PlannedArms, predict_arms
from loracle.plan.devices import DEVICES, Device, like_this
from loracle.plan.predict import Prediction
from loracle.plan.work import Rates
from loracle.sources.catalog import catalog

Changes = Mapping[str, Any]
"""Settings by the configuration's keys."""

# assumed: below this many tokens a pass leaves a GPU idle and saves little
_SMALLEST_PASS = 512


@dataclass(frozen=True)
class Fit:
    """Settings under which every arm fits."""

    changes: Changes
    """What they change; empty: nothing has to be."""
    config: Config
    """With the changes."""
    predictions: Mapping[str, Prediction]
    """Of every arm, with the changes."""

    def words(self) -> str:
        """Returns the changes as one would set them."""
        given = ((key, value_in_yaml(value)) for key, value in self.changes.items())
        return " ".join(f"--set {key}={value}" for key, value in given)


def value_in_yaml(value: object) -> str:
    """Returns a setting as ``--set`` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_fit(arms: PlannedArms, *, device: Device, rates: Rates | None) -> Fit:
    """Returns the settings nearest to those given with which every arm fits.

    Args:
        arms: The placements; all of them get the same settings.
        device: Where they will run.
        rates: How fast it is; None: not known.

    Raises:
        UsageError: If none fits, saying what the smallest needs and which device would hold it.
    """
    smallest: Prediction | None = None
    worst: list[str] | None = None
    for changes in candidates(arms, device=device):
        config = changed(arms.config, changes)
        tried = predict_arms(arms, device=device, rates=rates, config=config, only=worst)
        largest = max(tried, key=lambda name: tried[name].peak_gib)
        if smallest is None or tried[largest].peak_gib < smallest.peak_gib:
            smallest = tried[largest]
        if not tried[largest].fits:
            # The others are not asked again until the largest fits.
            worst = [largest]
            continue
        found = (
            tried
            if worst is None
            else predict_arms(arms, device=device, rates=rates, config=config)
        )
        if all(each.fits for each in found.values()):
            return Fit(changes, config, found)
    assert smallest is not None, "there is always a candidate"
    raise UsageError(_why_not(arms, device=device, smallest=smallest))


def candidates(arms: PlannedArms, *, device: Device) -> Iterator[Changes]:
    """Yields settings to try, the least intrusive first."""
    yield {}
    config = arms.config
    profile = profile_of(config.model, device)
    if profile is not None and not ("quantization" in profile and FULL in arms.plans):
        yield profile
    packings: list[str | None] = [config.quantization]
    if config.quantization is None and device.is_gpu and FULL not in arms.plans:
        packings.append("nf4")
    for packing in packings:
        for checkpointing in sorted({config.train.gradient_checkpointing, True}):
            for tokens in _passes(config):
                yield _differences(
                    config,
                    {
                        "quantization": packing,
                        "train.gradient_checkpointing": checkpointing,
                        "train.micro_batch_tokens": tokens,
                        "eval.batch_tokens": min(config.eval.batch_tokens, 2 * tokens),
                    },
                )


def profile_of(model: str, device: Device) -> Changes | None:
    """Returns what a model's profile for a device sets; None if it has none.

    Args:
        model: A key of model_configs.yaml, or a source.
        device: As the table names it.
    """
    entry = catalog().models.get(model)
    known = DEVICES.get(device.name) or like_this(device.name, memory_gib=device.memory_gib)
    found = entry.profiles.get(known.name) if entry and known and device.is_gpu else None
    return found.changes() if found else None


def _passes(config: Config) -> Iterator[int]:
    """Yields tokens per pass: as given, then halves, down to where a pass gets too small."""
    tokens = config.train.micro_batch_tokens
    floor = max(_SMALLEST_PASS, config.data.max_tokens)
    yield tokens
    while tokens // 2 >= floor:
        tokens //= 2
        yield tokens


def _differences(config: Config, wanted: Changes) -> Changes:
    now = {
        "quantization": config.quantization,
        "train.gradient_checkpointing": config.train.gradient_checkpointing,
        "train.micro_batch_tokens": config.train.micro_batch_tokens,
        "eval.batch_tokens": config.eval.batch_tokens,
    }
    return {key: value for key, value in wanted.items() if now[key] != value}


def changed(config: Config, changes: Changes) -> Config:
    """Returns a configuration with these keys set."""
    tree: Mapping[str, Any] = config.model_dump(mode="json")
    for key, value in changes.items():
        tree = merge(tree, nested(key, value))
    return parse_config(tree, origin="settings that fit")


def with_config(arms: PlannedArms, config: Config) -> PlannedArms:
    """Returns the same placements under another configuration."""
    return replace(arms, config=config)


def _why_not(arms: PlannedArms, *, device: Device, smallest: Prediction) -> str:
    need = smallest.peak_gib
    larger = sorted(
        (each for each in DEVICES.values() if need <= 0.95 * each.memory_gib),
        key=lambda each: each.memory_gib,
    )
    would = f"{larger[0].name} would hold it" if larger else "no device of the table holds it"
    how = "in 4 bits" if smallest.quantization else f"in {smallest.dtype}"
    return (
        f"{arms.config.model}: does not fit {device.name} ({device.memory_gib:.1f} GiB): with "
        f"checkpointing, {smallest.micro_batch_tokens} tokens per pass and the base {how} a run "
        f"needs {need:.1f} GiB; {would}, or choose a smaller model"
    )
