"""Finds settings under which all runs fit a device, the least intrusive first.

Smaller passes and gradient checkpointing change memory and time but no result; a base in 4 bits is
another model, comes last, and is reported as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from loracle.config.files import merge, nested, parse_config
from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.forecast.cases import PlannedArms, predict_cases
from loracle.forecast.devices import DEVICES, Device, like_this
from loracle.forecast.op_costs import Rates
from loracle.forecast.predict import Prediction, dtype_on
from loracle.placement.plan import FULL
from loracle.sources.catalog import catalog

Changes = Mapping[str, Any]
"""Settings by their dotted keys."""

# assumed: below this many tokens a pass leaves a GPU idle and saves little
_SMALLEST_PASS = 512

# The order in which the costs of changes are listed.
_ORDER = (
    "dtype",
    "quantization",
    "train.gradient_checkpointing",
    "train.micro_batch_tokens",
    "eval.batch_tokens",
    "eval.generate_batch_size",
)


@dataclass(frozen=True)
class Step:
    """Cost of a run after one more setting is changed."""

    setting: str
    """``key=value``; empty: the settings as given."""
    peak_gib: float
    """Highest peak of all phases."""
    step_s: float | None
    """Seconds of an optimizer step; None: the device's speed is unknown."""


@dataclass(frozen=True)
class Fit:
    """Settings under which every arm fits."""

    changes: Changes
    """Settings that differ from those given."""
    config: Config
    """The configuration with the changes."""
    predictions: Mapping[str, Prediction]
    """Predictions of every arm, with the changes."""
    arm: str
    """The arm that needs most memory."""
    steps: tuple[Step, ...]
    """Cumulative effect of each change on a run of that arm; the first: as given."""

    @property
    def peak_gib(self) -> float:
        """Highest peak of all arms, with the changes."""
        return max(prediction.peak_gib for prediction in self.predictions.values())

    @property
    def overrides(self) -> tuple[str, ...]:
        """The changes as ``--set`` takes them."""
        return tuple(_setting(key, value) for key, value in self.changes.items())


def _setting(key: str, value: object) -> str:
    return f"{key}={value_in_yaml(value)}"


def value_in_yaml(value: object) -> str:
    """Returns a value as ``--set`` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_fit(
    arms: PlannedArms,
    *,
    device: Device,
    rates: Rates | None,
    known: Mapping[str, Prediction] | None = None,
) -> Fit:
    """Returns the settings nearest to those given with which every arm fits.

    All arms get the same settings. ``known`` holds their predictions as given, if there are any.

    Raises:
        UsageError: If no settings fit, stating the smallest need and a device that would hold it.
    """
    predict = partial(predict_cases, arms, device=device, rates=rates)
    given = dict(known or {})
    # The other arms are predicted only once this one fits.
    arm = _largest(given) if given else _most_modules(arms)
    smallest: Prediction | None = None
    for changes in candidates(arms, device=device):
        config = changed(arms.config, changes)
        tried = given[arm] if not changes and arm in given else predict([(arm, config)])[0]
        if not changes:
            given[arm] = tried
        if smallest is None or tried.peak_gib < smallest.peak_gib:
            smallest = tried
        if not tried.fits:
            continue
        others = [name for name in arms.plans if name != arm]
        path = _path(arms.config, changes, device=device)
        between: list[Changes] = [] if arm in given else [{}]
        between += path[1:-1]
        cases = [(name, config) for name in others]
        cases += [(arm, changed(arms.config, partly)) for partly in between]
        made = predict(cases)
        rest = dict(zip(others, made, strict=False))
        predictions = {name: rest.get(name, tried) for name in arms.plans}
        largest = _largest(predictions)
        if predictions[largest].fits:
            ends = [*made[len(others) :], tried]
            ends = [given[arm], *ends] if arm in given else ends
            return Fit(changes, config, predictions, arm, _steps(path, ends))
        arm = largest
    assert smallest is not None, "there is always a candidate"
    raise UsageError(_why_not(arms, device=device, smallest=smallest))


def _largest(predictions: Mapping[str, Prediction]) -> str:
    return max(predictions, key=lambda name: predictions[name].peak_gib)


def _most_modules(arms: PlannedArms) -> str:
    """Returns the arm that probably needs most memory: full fine-tuning, or most modules."""
    plans = arms.plans
    return max(plans, key=lambda name: (plans[name].is_full, len(plans[name].modules)))


def _path(config: Config, changes: Changes, *, device: Device) -> list[Changes]:
    """Returns the prefixes of the changes in order, from none to all."""
    keys = [key for key in _ORDER if key in changes]
    given = dtype_on(device, requested=config.dtype)
    if "dtype" in keys and dtype_on(device, requested=changes["dtype"]) == given:
        keys.remove("dtype")
    return [{key: changes[key] for key in keys[:count]} for count in range(len(keys) + 1)]


def _steps(path: Sequence[Changes], predictions: Sequence[Prediction]) -> tuple[Step, ...]:
    added = [""]
    for before, after in pairwise(path):
        added += [_setting(key, value) for key, value in after.items() if key not in before]
    return tuple(
        Step(setting, prediction.peak_gib, prediction.times.step_s if prediction.times else None)
        for setting, prediction in zip(added, predictions, strict=False)
    )


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
                found = _differences(
                    config,
                    {
                        "quantization": packing,
                        "train.gradient_checkpointing": checkpointing,
                        "train.micro_batch_tokens": tokens,
                        "eval.batch_tokens": min(config.eval.batch_tokens, 2 * tokens),
                    },
                )
                if found:
                    yield found


def profile_of(model: str, device: Device) -> Changes | None:
    """Returns the settings of a model's profile for a device; None if it has none."""
    entry = catalog().models.get(model)
    listed = DEVICES.get(device.name) or like_this(device.name, memory_gib=device.memory_gib)
    profile = entry.profiles.get(listed.name) if entry and listed and device.is_gpu else None
    return profile.changes() if profile else None


def _passes(config: Config) -> Iterator[int]:
    """Yields tokens per pass: as given, then halved down to the smallest useful pass."""
    tokens = config.train.micro_batch_tokens
    floor = max(_SMALLEST_PASS, config.data.max_tokens)
    yield tokens
    while tokens // 2 >= floor:
        tokens //= 2
        yield tokens


def _differences(config: Config, changes: Changes) -> Changes:
    given = {
        "quantization": config.quantization,
        "train.gradient_checkpointing": config.train.gradient_checkpointing,
        "train.micro_batch_tokens": config.train.micro_batch_tokens,
        "eval.batch_tokens": config.eval.batch_tokens,
    }
    return {key: value for key, value in changes.items() if given[key] != value}


def changed(config: Config, changes: Changes) -> Config:
    """Returns the configuration with these keys set."""
    tree: Mapping[str, Any] = config.model_dump(mode="json")
    for key, value in changes.items():
        tree = merge(tree, nested(key, value))
    return parse_config(tree, origin="settings that fit")


def _why_not(arms: PlannedArms, *, device: Device, smallest: Prediction) -> str:
    need = smallest.peak_gib
    larger = sorted(
        (candidate for candidate in DEVICES.values() if need <= 0.95 * candidate.memory_gib),
        key=lambda candidate: candidate.memory_gib,
    )
    would = f"{larger[0].name} would hold it" if larger else "no device of the table holds it"
    how = "in 4 bits" if smallest.quantization else f"in {smallest.dtype}"
    return (
        f"{arms.config.model}: does not fit {device.name} ({device.memory_gib:.1f} GiB): with "
        f"checkpointing, {smallest.micro_batch_tokens} tokens per pass and the base {how} a run "
        f"needs {need:.1f} GiB; {would}, or choose a smaller model"
    )
