"""Config files: YAML read strictly, merged over the one table of defaults, validated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from loracle.config.faults import WORD_OR_MAPPING, describe_fault
from loracle.config.run import Config
from loracle.config.strict_yaml import Dumper, load_value, load_yaml
from loracle.errors import ConfigError, did_you_mean
from loracle.text import active_character

Model = TypeVar("Model", bound=BaseModel)


def load_config(config: str | Path = "base_config", *, overrides: Sequence[str] = ()) -> Config:
    """Returns the resolved configuration of a run.

    Args:
        config: A YAML file, or the name of a shipped one.
        overrides: ``a.b=value`` strings, the value read by `load_value`.

    Raises:
        ConfigError: Listing every unknown key, wrong type and value out of range at once.
    """
    return resolve_config(
        config,
        changes=[parse_override(override) for override in overrides],
        origin=find_config(config).name + (" with --set" if overrides else ""),
    )


def resolve_config(
    config: str | Path, *, changes: Sequence[Mapping[str, Any]], origin: str
) -> Config:
    """Returns a configuration: the table of defaults, a file over it, and changes over both.

    Args:
        config: A YAML file, or the name of a shipped one.
        changes: Nested as in a file; later ones win.
        origin: Names the configuration in messages.

    Raises:
        ConfigError: Listing every fault.
    """
    path = find_config(config)
    given = read_yaml(path)
    if "arms" in given:
        raise ConfigError(f"{path.name}: a study, not a run; use: loracle study {config}")
    tree = read_yaml(shipped_config("base_config"))
    for change in [given, *changes]:
        tree = merge(tree, change)
    return parse_config(tree, origin=origin)


def parse_config(tree: Mapping[str, Any], *, origin: str) -> Config:
    """Returns ``tree`` as a configuration, as ``validate`` does."""
    return validate(Config, tree, origin=origin)


def validate(model: type[Model], tree: Mapping[str, Any], *, origin: str) -> Model:
    """Returns ``tree`` as a ``model``; ``origin`` names it in messages.

    Raises:
        ConfigError: Listing every fault in one line.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = [describe_fault(fault, tree, root=model) for fault in error.errors()]
        listed = "; ".join(dict.fromkeys(fault for fault in faults if fault))
        raise ConfigError(f"{origin}: {' '.join(listed.split())}") from None


def shipped_configs() -> dict[str, Path]:
    """Returns the shipped configs by name, without the model table."""
    paths = sorted(_config_folder().glob("*.yaml"))
    return {path.stem: path for path in paths if path.stem != "model_configs"}


def shipped_config(name: str) -> Path:
    """Returns the path of a shipped config file, ``model_configs`` included."""
    return _config_folder() / f"{name}.yaml"


def find_config(config: str | Path) -> Path:
    """Returns the file at the path ``config``, else the shipped config of that name.

    Raises:
        ConfigError: If there is neither.
    """
    path = at_home(config)
    if code := active_character(path.name):  # it names the study, in records and on pages
        raise ConfigError(f"config '{config}': its name holds the character {code}; rename it")
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(config) in shipped:
        return shipped[str(config)]
    raise ConfigError(
        f"config '{config}': no such file, and no shipped config of that name "
        f"(there are {', '.join(shipped)}){did_you_mean(str(config), shipped)}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: If the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path.name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: not UTF-8 at byte {error.start}") from None
    tree = load_yaml(text, origin=path.name)
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path.name}: must be 'key: value' lines, got {type(tree).__name__}")
    return tree or {}


def at_home(path: str | Path) -> Path:
    """Returns a path that a user gave, with ``~`` read as the home folder.

    Raises:
        ConfigError: If it names the home of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"'{path}': no such home folder") from None


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Returns ``tree`` as YAML in its own key order, read alike as YAML 1.1 and 1.2."""
    return yaml.dump(dict(tree), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _config_folder() -> Path:
    """Returns ``loracle/configs`` of a wheel, or ``experiments/configs`` of a checkout."""
    shipped = Path(str(files("loracle"))) / "configs"
    checkout = Path(__file__).parents[3] / "experiments" / "configs"
    return shipped if shipped.is_dir() else checkout


def parse_override(override: str) -> dict[str, Any]:
    """Returns ``a.b=value`` nested as in a file, the value read by `load_value`.

    Raises:
        ConfigError: If it does not have that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: must be key=value, e.g. train.max_steps=100")
    return nested(key, load_value(text, origin=f"--set {key}"))


def nested(key: str, value: Any) -> dict[str, Any]:
    """Returns a dotted key and its value nested as in a file."""
    first, *others = key.strip().split(".")
    for part in reversed(others):
        value = {part: value}
    return {first: value}


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``base`` updated with ``overlay``, section by section."""
    merged = dict(base)
    for key, value in overlay.items():
        section = merged.get(key)
        if isinstance(section, dict) and isinstance(value, dict) and key not in WORD_OR_MAPPING:
            value = merge(section, value)
        merged[key] = value
    return merged
