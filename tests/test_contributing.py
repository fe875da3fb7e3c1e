"""CONTRIBUTING's walks name files and functions that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(
    r"`([\w/]+\.py)(?:: (\w+))?`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
)


def test_the_walks_name_files():
    assert len(NAMED) >= 15


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_a_walk_names_is_there(file, name):
    path = ROOT / "src" / "loracle" / file
    assert path.is_file(), file
    if name:
        assert re.search(rf"^(def|class) {name}\b", path.read_text(encoding="utf-8"), re.M), name
