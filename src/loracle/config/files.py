"""Config files: YAML read strictly, merged over the one table of defaults, validated once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from loracle.config.run import Config
from loracle.errors import ConfigError, did_you_mean
from loracle.text import active_character

Model = TypeVar("Model", bound=BaseModel)


def load_config(config: str | Path = "base_config", *, overrides: Sequence[str] = ()) -> Config:
    """Returns the resolved configuration of a run.

    Args:
        config: A YAML file, or the name of a shipped one.
        overrides: ``a.b=value`` strings, the value read as YAML.

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
        faults = [_describe(fault, tree, root=model) for fault in error.errors()]
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
    path = Path(config)
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
    tree = _load_yaml(text, origin=path.name)
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path.name}: must be 'key: value' lines, got {type(tree).__name__}")
    return tree or {}


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Returns ``tree`` as YAML in its own key order."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def _config_folder() -> Path:
    """Returns ``loracle/configs`` of a wheel, or ``experiments/configs`` of a checkout."""
    shipped = Path(str(files("loracle"))) / "configs"
    checkout = Path(__file__).parents[3] / "experiments" / "configs"
    return shipped if shipped.is_dir() else checkout


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without two of its traps: ``2e-4`` is a number, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _yaml_fault(f"key {key!r} is not a word", key_node)
            if key in seen:
                raise _yaml_fault(f"key '{key}' is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_fault(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _load_yaml(text: str, *, origin: str) -> Any:
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        _require_text(tree, key="", origin=origin)
        return tree
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line}: {error.problem or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML ({' '.join(str(error).split())})") from None


def _require_text(value: Any, *, key: str, origin: str) -> None:
    """Refuses texts that would act on a screen or page instead of being shown."""
    if isinstance(value, str) and (code := active_character(value)):
        raise ConfigError(
            f"{origin}: {key or 'value'}: holds the character {code}, which is no text; remove it"
        )
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        _require_text("".join(value), key=key or "a key", origin=origin)
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for name, entry in entries:
        _require_text(entry, key=f"{key}.{name}" if key else str(name), origin=origin)


def parse_override(override: str) -> dict[str, Any]:
    """Returns ``a.b=value`` nested as in a file, the value read as YAML.

    Raises:
        ConfigError: If it does not have that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: must be key=value, e.g. train.max_steps=100")
    return nested(key, _load_yaml(text, origin=f"--set {key}"))


def nested(key: str, value: Any) -> dict[str, Any]:
    """Returns a dotted key and its value nested as in a file."""
    first, *others = key.strip().split(".")
    for part in reversed(others):
        value = {part: value}
    return {first: value}


# Keys that take a word or a mapping. The mapping is one value: it is replaced, not merged.
_WHOLE = {
    "placement": "a preset's name or a mapping with modules and layers",
    "template": "alpaca or a mapping with with_input and without_input",
}


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``base`` updated with ``overlay``, section by section."""
    merged = dict(base)
    for key, value in overlay.items():
        section = merged.get(key)
        if isinstance(section, dict) and isinstance(value, dict) and key not in _WHOLE:
            value = merge(section, value)
        merged[key] = value
    return merged


def _describe(fault: Any, tree: Mapping[str, Any], *, root: type[BaseModel]) -> str | None:
    """Returns a fault as ``key: what is allowed, what was given``; None if another covers it."""
    if not fault["loc"]:
        return str(fault["msg"].removeprefix("Value error, "))
    *parents, given = fault["loc"]
    is_unknown = fault["type"] == "extra_forbidden"
    location = [part for part in parents if not _is_union_label(part)]
    location += [given] if is_unknown or not _is_union_label(given) else []
    key, last = ".".join(str(part) for part in location), str(location[-1])
    value = _value_at(location, tree)
    if is_unknown:
        return f"{key}: unknown key{did_you_mean(last, _siblings(location, root=root))}"
    if fault["type"] == "missing":
        return f"{key}: missing"
    if last in _WHOLE and fault["type"] in ("string_type", "literal_error", "model_type"):
        is_mapping = isinstance(value, Mapping)
        return None if is_mapping else f"{key}: must be {_WHOLE[last]}, got {value!r}"
    if fault["type"] == "model_type":
        return f"{key}: must be a section of 'key: value' lines, got {value!r}"
    message = fault["msg"].removeprefix("Value error, ")
    allowed = re.findall(r"'([^']+)'", message) if fault["type"] == "literal_error" else []
    hint = did_you_mean(str(value), allowed)
    return f"{key}: {message[0].lower()}{message[1:]}, got {value!r}{hint}"


def _is_union_label(part: str | int) -> bool:
    """Returns whether pydantic added this part of a location to name a branch of a union."""
    return isinstance(part, str) and bool(re.search(r"[\[(]|^(str|int|list)$|Config$", part))


def _siblings(location: Sequence[str | int], *, root: type[BaseModel]) -> Iterable[str]:
    section: Any = root
    parts = iter(location[:-1])
    for part in parts:
        annotation = section.model_fields[part].annotation
        if getattr(annotation, "__origin__", None) is dict:
            next(parts)  # the entry's name in the file
        parts_of_union = getattr(annotation, "__args__", ())
        options = [annotation, *(getattr(part, "__origin__", part) for part in parts_of_union)]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return section.model_fields  # type: ignore[no-any-return]


def _value_at(location: Sequence[str | int], tree: Any) -> Any:
    for part in location:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree
