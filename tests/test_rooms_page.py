"""docs/rooms.md lists the rooms that there are, in the enforced order, and names existing code."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "loracle"
PAGE = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
NAMED = re.findall(r"`([\w/]+\.py): (\w+)`", PAGE)


def test_the_page_lists_every_room_and_no_other():
    listed = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(listed) == ROOMS


def test_the_drawing_is_the_enforced_order():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    assert "```\n" + "\n".join(layers) + "\n```" in PAGE


def test_the_page_names_code_of_every_room():
    assert sorted({file.partition("/")[0] for file, _ in NAMED}) == ROOMS


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_page_names_is_there(file, name):
    text = (PACKAGE / file).read_text(encoding="utf-8")
    assert re.search(rf"^(?:def |class )?{name}\b", text, re.MULTILINE), name
