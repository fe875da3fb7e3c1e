"""YAML read by the core schema of YAML 1.2, so that a value is what it looks like.

PyYAML reads YAML 1.1, where ``012`` is ten, ``1:30`` is ninety, ``no`` is false and ``2e-4`` is
text. Here whole numbers are decimal (or ``0o17``, ``0x1F``), only ``true`` and ``false`` are
booleans, ``null`` and ``~`` are null, and dates are text.
Source: YAML 1.2.2 (2021), section 10.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from loracle.errors import ConfigError
from loracle.text import active_character

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)"
)
# The first that matches decides: 12 is a whole number, although it could be a float.
_SCALARS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}
_RESOLVERS = [
    (_TAG + kind, re.compile(rf"(?:{form.pattern})\Z")) for kind, form in _SCALARS.items()
]
_MERGE = _TAG + "merge"
# assumed: no configuration needs more; ten aliases of ten aliases, nine deep, would fill the memory
_MOST_VALUES = 100_000
_UNICODE_BREAK = re.compile("[\x85\u2028\u2029\ufeff]")
# No library takes a whole number beyond 64 bits: 22 digits of the smallest base, 8.
_LARGEST, _MOST_DIGITS = 2**63 - 1, 22


def load_yaml(text: str, *, origin: str) -> Any:
    """Returns the one document in ``text``.

    Args:
        text: A YAML file's content.
        origin: Names the text in messages.

    Raises:
        ConfigError: With the line, if it is not YAML, a key is given twice or is not a word, or a
            number is too large.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None and _size(root, {}) > _MOST_VALUES:
            raise ConfigError(f"{origin}: repeats its parts to more than {_MOST_VALUES:,} values")
        tree = None if root is None else loader.construct_document(root)
        _require_text(tree, key="", origin=origin)
        return tree
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line}: {error.problem or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply") from None


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


def load_value(text: str, *, origin: str) -> Any:
    """Returns one value from a command line.

    A list, a mapping, a quoted text or several lines are YAML. Anything else is one word of YAML to
    its end: a command line has no comments and no keys in a value, so ``#`` and ``:`` are text.

    Raises:
        ConfigError: As ``load_yaml``.
    """
    word = text.strip()
    if word.startswith(("[", "{", '"', "'")) or "\n" in word:
        return load_yaml(text, origin=origin)
    _require_text(word, key="", origin=origin)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, word, (True, False))  # type: ignore[no-untyped-call]
    node = yaml.ScalarNode(tag, word)
    try:
        return _value_of(node)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{origin}: {error.problem}") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Returns the values below a node, each part counted as often as it is repeated."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        below = [value for _, value in node.value] if pairs else node.value
        known[id(node)] = 1 + sum(_size(value, known) for value in below)
    return known[id(node)]


def _value_of(node: yaml.ScalarNode) -> Any:
    """Returns the value of a scalar whose kind is in its tag, resolved or written out."""
    kind, word = node.tag.removeprefix(_TAG), str(node.value)
    if kind in _SCALARS and not _SCALARS[kind].fullmatch(word):
        raise _fault(f"'{word}' is no {kind}", node)
    read = {"null": lambda _: None, "bool": lambda word: word.lower() == "true", "float": _real}
    return _whole(word, node) if kind == "int" else read.get(kind, str)(word)


def _whole(word: str, node: yaml.ScalarNode) -> int:
    base = {"0o": 8, "0x": 16}.get(word[:2], 10)
    digits = word.lstrip("+-0ox") or "0"
    # Python refuses to read thousands of digits, so their number is looked at first.
    value = int(digits, base) if len(digits) <= _MOST_DIGITS else _LARGEST + 1
    if value > _LARGEST:
        raise _fault(f"{word[:40]} is too large for a whole number (64 bits)", node)
    return -value if word.startswith("-") else value


def _real(word: str) -> float:
    return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _fault(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    loader.construct_scalar(node)  # Raises if a list or mapping is said to be a scalar.
    return _value_of(node)


class _Loader(yaml.SafeLoader):
    """A safe loader with the core schema alone, and without keys that are lost or not words."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML keeps its tables in classes
        None: [*_RESOLVERS, (_MERGE, re.compile(r"<<\Z"))]
    }
    # Not those of YAML 1.1: dates, sets, pairs and bytes among them.
    yaml_constructors = {  # noqa: RUF012 - as above
        **{_TAG + kind: _scalar for kind in (*_SCALARS, "str", "merge")},
        _TAG + "seq": yaml.SafeLoader.construct_yaml_seq,
        _TAG + "map": yaml.SafeLoader.construct_yaml_map,
        None: yaml.SafeLoader.construct_undefined,
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        node: yaml.Node | None = super().compose_node(parent, index)
        # An alias to a collection of which not all has been read: that has no end yet.
        if isinstance(node, yaml.CollectionNode) and node.end_mark is None:
            raise _fault("a part that stands inside of itself", node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a list or mapping cannot be a key", key)
            if key.tag not in (_TAG + "str", _MERGE):
                raise _fault(f"key {key.value or 'null'} is not a word", key)
            if key.value in seen:
                raise _fault(f"key '{key.value}' is given twice", key)
            seen.add(key.value)
        return node


class Dumper(yaml.SafeDumper):
    """A safe dumper that quotes a text if YAML 1.1 or 1.2 would read it as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In any other style the line breaks of Unicode come back as blanks.
    style = '"' if _UNICODE_BREAK.search(text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


Dumper.add_representer(str, _represent_text)

for _tag, _form in _RESOLVERS:
    Dumper.add_implicit_resolver(_tag, _form, None)
