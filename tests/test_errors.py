"""Exit codes follow the tree that the module draws, and hints name the nearest word."""

import inspect
import re

import pytest

from loracle import errors
from loracle.errors import LoracleError, did_you_mean

EXIT_CODES = {
    "LoracleError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "ConfoundError": 2,
    "SourceError": 2,
    "DataError": 2,
    "PlacementError": 2,
    "ModelError": 2,
    "LeakError": 2,
    "RunFolderError": 2,
    "RunFailed": 1,
    "NonFiniteError": 1,
    "AuditError": 1,
    "OutOfMemory": 1,
    "UnexpectedError": 1,
    "Interrupted": 130,
}
DEFINED = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, LoracleError)
}


def test_every_error_has_its_exit_code():
    assert {name: kind.exit_code for name, kind in DEFINED.items()} == EXIT_CODES


def test_the_drawn_tree_is_the_tree():
    depth_of_parent: dict[int, str] = {}
    drawn = {}
    for line in errors.__doc__.splitlines():
        found = re.match(r"^    ([│├└─ ]*)(\w+)\b", line)
        if found and found[2] in DEFINED:
            depth = len(found[1]) // 4
            depth_of_parent[depth] = found[2]
            drawn[found[2]] = depth_of_parent[depth - 1] if depth else "Exception"
    assert drawn == {name: kind.__base__.__name__ for name, kind in DEFINED.items()}


@pytest.mark.parametrize(
    ("given", "allowed", "hint"),
    [
        ("learning_rte", ["learning_rate", "max_steps"], "; did you mean 'learning_rate'?"),
        ("xyz", ["learning_rate", "max_steps"], ""),
        ("anything", [], ""),
        ("a", iter(["b", "a"]), "; did you mean 'a'?"),
    ],
)
def test_the_nearest_word_or_nothing(given, allowed, hint):
    assert did_you_mean(given, allowed) == hint
