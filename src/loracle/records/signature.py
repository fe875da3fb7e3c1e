"""The signature that results carry, and the comparison of two environments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from loracle.config.run import Config, changes, config_digest, flatten

# What must agree before two runs' numbers share a table, as dotted keys or their sections.
_COMPARED = ("loracle", "python", "device", "torch_settings", "cuda", "versions")


_SAID_BY_ENGINE = ("loracle.version", "loracle.commit", "loracle.dirty")


def signature(
    *, config: Config, model: str, data: str, placement: str, environment: Mapping[str, Any]
) -> str:
    """Returns one line that says what a result is a result of, after sacreBLEU's.

    Args:
        config: The run's configuration; ranks, steps, batch, rate and seed come from it.
        model: ``name@revision`` of the base.
        data: Fingerprint of the records, their split and their tokens.
        placement: Name of the placement.
        environment: What ``capture_environment`` returned.
    """
    packages = environment["versions"]
    items = {
        "model": without_folder(model),
        "data": data,
        "placement": placement,
        "r": config.lora.rank,
        "alpha": f"{config.lora.alpha:g}",
        "dropout": f"{config.lora.dropout:g}",
        "steps": config.train.max_steps,
        "batch": config.train.batch_size,
        "lr": f"{config.train.learning_rate:g}",
        "schedule": config.train.schedule,
        "tokens": config.data.max_tokens,
        "config": _settings_digest(config),
        "seed": config.seed,
        "dtype": "+".join(
            environment["device"][key]
            for key in ("dtype", "quantization")
            if key in environment["device"]
        ),
        "device": environment["device"]["name"],
        "threads": environment["torch_settings"]["num_threads"],
        **{name: packages[name] for name in ("torch", "transformers", "peft")},
        "loracle": environment["loracle"]["version"],
        "commit": _commit(environment["loracle"]),
    }
    return "|".join(f"{key}:{_word(value)}" for key, value in items.items())


def _settings_digest(config: Config) -> str:
    """Returns 12 hex digits of every setting, but for those that have an item of their own.

    Seeds of one configuration share it, and a local source may lie anywhere.
    """
    data = config.data.model_copy(update={"source": ""})
    own = {"model": "", "data": data, "seed": 0, "dtype": "auto", "device": "auto"}
    return config_digest(config.model_copy(update=own))


def environment_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns ``key: one's value -> other's value`` wherever two numbers stop being comparable.

    Versions, the engine's code, device, dtype, threads and PyTorch's switches; not the date, the
    memory, how many cores lay idle, or a commit that changed nothing of the engine.
    """
    return changes(_compared(one), _compared(other))


def without_folder(source: str) -> str:
    """Returns a source without the folder of a local one: ``path:/a/b.json`` is ``path:b.json``."""
    return f"path:{PurePath(source[5:]).name}" if source.startswith("path:") else source


def _compared(environment: Mapping[str, Any]) -> dict[str, Any]:
    found = flatten({key: environment.get(key) for key in _COMPARED})
    if "loracle.engine" in found:
        # Says what the commit says, and nothing of what does not count.
        found = {key: value for key, value in found.items() if key not in _SAID_BY_ENGINE}
    return found


def _commit(loracle: Mapping[str, Any]) -> str:
    if loracle["commit"] is None:
        return "n/a"
    return f"{loracle['commit'][:7]}{'+dirty' if loracle['dirty'] else ''}"


def _word(value: Any) -> str:
    """Returns a value without the characters that a signature is split at."""
    return re.sub(r"[|\s]+", "-", "n/a" if value is None else str(value))
