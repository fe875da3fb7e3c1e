"""What may be installed: each lower bound is a version that ``make test-oldest`` installs."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = re.compile(r"[-_.]+")


def pins_of(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {NAME.sub("-", name).lower(): version for name, version in pairs}


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = pins_of("constraints-oldest.txt")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        pinned = oldest[NAME.sub("-", requirement.name).lower()]
        assert re.sub(r"(\.0)+$", "", pinned) == re.sub(r"(\.0)+$", "", bound), requirement


def test_every_dependency_is_pinned_within_its_bounds():
    pins = pins_of("constraints.txt")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(pins[NAME.sub("-", requirement.name).lower()])
