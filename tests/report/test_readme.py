"""What the README tells a reader to type is understood."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from loracle.cli.main import app
from loracle.config.files import load_config
from loracle.study.file import load_study

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks():
    return re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)


def lines(program):
    shown = (line for block in blocks() for line in block.splitlines())
    return [line for line in shown if line.startswith(f"{program} ")]


def words_of(line):
    return shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("line", lines("loracle"))
def test_every_command_is_understood(line):
    verb, *words = words_of(line)
    command = typer.main.get_command(app).commands[verb]
    given = command.make_context(verb, words).params
    if verb in ("baseline", "config"):
        load_config(given["config"], overrides=given.get("overrides") or ())
    if verb == "study":
        load_study(given["config"], overrides=given["overrides"] or ())


def test_every_target_of_make_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in lines("make"):
        assert re.search(rf"^{words_of(line)[0]}:", makefile, flags=re.MULTILINE), line


def test_every_verb_is_shown():
    shown = {words_of(line)[0] for line in lines("loracle")}
    assert shown == set(typer.main.get_command(app).commands)


def test_every_link_into_the_repository_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
