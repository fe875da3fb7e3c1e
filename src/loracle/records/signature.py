"""The signature that results carry, and the comparison of two environments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from loracle.config.run import Config, changes, config_digest, flatten

# Sections that must agree before the numbers of two runs share a table.
_COMPARED = ("loracle", "python", "device", "torch_settings", "cuda", "versions")
# Implied by the digest of the engine's code, where there is one.
_IMPLIED_BY_ENGINE = ("loracle.version", "loracle.commit", "loracle.dirty")


def signature(
    *, config: Config, model: str, data: str, placement: str, environment: Mapping[str, Any]
) -> str:
    """Returns one line that identifies what produced a result, after sacreBLEU's.

    ``model``: the base as ``name@revision``; ``data``: fingerprint of records, split and tokens.
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
        **_determinism(environment["torch_settings"]),
        **{name: packages[name] for name in ("torch", "transformers", "peft")},
        "loracle": environment["loracle"]["version"],
        "commit": _commit(environment["loracle"]),
    }
    return "|".join(f"{key}:{_word(value)}" for key, value in items.items())


def _settings_digest(config: Config) -> str:
    """Returns 12 hex digits of the settings without an item of their own in the signature."""
    data = config.data.model_copy(update={"source": ""})
    own = {"model": "", "data": data, "seed": 0, "dtype": "auto", "device": "auto"}
    return config_digest(config.model_copy(update={**own, "deterministic": None}))


def environment_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns ``key: a's value -> b's value`` wherever numbers stop being comparable.

    Versions, the engine's code, device, dtype, threads and PyTorch's switches; not the date, the
    memory, idle cores, or a commit that did not change the engine.
    """
    return changes(_compared(a), _compared(b))


def without_folder(source: str) -> str:
    """Returns a source without the folder of a local one: ``path:/a/b.json`` is ``path:b.json``."""
    return f"path:{PurePath(source[5:]).name}" if source.startswith("path:") else source


def _compared(environment: Mapping[str, Any]) -> dict[str, Any]:
    values = flatten({key: environment.get(key) for key in _COMPARED})
    if "loracle.engine" in values:
        values = {key: value for key, value in values.items() if key not in _IMPLIED_BY_ENGINE}
    return values


def _determinism(torch_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the item of a run on a GPU whose operations repeat.

    A run without it is one on a CPU, where they do without a switch, or on a GPU where they do not;
    so are all older ones.
    """
    return {"deterministic": "yes"} if torch_settings.get("deterministic_algorithms") else {}


def _commit(loracle: Mapping[str, Any]) -> str:
    if loracle["commit"] is None:
        return "n/a"
    return f"{loracle['commit'][:7]}{'+dirty' if loracle['dirty'] else ''}"


def _word(value: Any) -> str:
    """Returns a value without the characters that a signature is split at."""
    return re.sub(r"[|\s]+", "-", "n/a" if value is None else str(value))
