"""Reads a study's file, resolves its base, and refuses arms that differ in more than placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loracle.config.files import (
    find_config,
    merge,
    nested,
    parse_config,
    parse_override,
    read_yaml,
    resolve_config,
    validate,
)
from loracle.config.run import Config, difference
from loracle.errors import ConfigError, ConfoundError
from loracle.study.config import ArmConfig, StudyConfig

# Keys that an arm may change, with alpha / r held.
_PLACEMENT_KEYS = frozenset({"lora.placement", "lora.rank", "lora.alpha"})


def load_study(study: str | Path, *, overrides: Sequence[str] = ()) -> tuple[StudyConfig, Config]:
    """Returns a study and the configuration that its arms share.

    Args:
        study: A YAML file, or the name of a shipped one.
        overrides: ``key=value`` pairs, of the study or of the configuration.

    Raises:
        ConfigError: Listing every fault of the file.
        ConfoundError: If an arm changes more than its placement.
    """
    path = find_config(study)
    tree = read_yaml(path)
    if "arms" not in tree:
        raise ConfigError(f"{path.name}: not a study, it has no arms (for a run: loracle baseline)")
    given = [parse_override(override) for override in overrides]
    of_study = [change for change in given if next(iter(change)) in StudyConfig.model_fields]
    for change in of_study:
        tree = merge(tree, change)
    config = parse_study(tree, origin=path.name)
    beside = path.parent / config.base
    base = resolve_config(
        beside if beside.is_file() else config.base,
        changes=[config.config, *(change for change in given if change not in of_study)],
        origin=path.name + (" with --set" if given else ""),
    )
    for name, arm in config.arms.items():
        require_no_confound(name, arm, base=base, origin=path.name)
    return config, base


def parse_study(tree: Mapping[str, Any], *, origin: str) -> StudyConfig:
    """Returns ``tree`` as a study, as ``validate`` does."""
    return validate(StudyConfig, tree, origin=origin)


def require_no_confound(name: str, arm: ArmConfig, *, base: Config, origin: str) -> None:
    """Checks that an arm differs from the base only in its placement and the rank it implies.

    Raises:
        ConfigError: If it sets an unknown key, or a value out of range.
        ConfoundError: Naming the keys, if it changes anything else.
    """
    tree: Mapping[str, Any] = base.model_dump(mode="json")
    for key, value in arm.config.items():
        tree = merge(tree, nested(key, value))
    changes = difference(base, parse_config(tree, origin=f"{origin}, arms.{name}"))
    if not changes:
        return
    if any(line.partition(":")[0] in _PLACEMENT_KEYS for line in changes):
        raise ConfoundError(
            f"{origin}: arm '{name}': its placement and rank are keys of their own, not lora.*; "
            "alpha follows from the rank, so that alpha / r is the same for all arms"
        )
    raise ConfoundError(
        f"{origin}: arm '{name}' differs from the others in more than its placement "
        f"({'; '.join(changes)}); give it to all arms under 'config', or leave it out"
    )
