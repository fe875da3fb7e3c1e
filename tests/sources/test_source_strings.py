from __future__ import annotations

import os
from pathlib import Path

import pytest

from loracle.sources.spec import HubSource, PathSource, PypiSource, parse_source, shown

SHA = "0123456789abcdef" * 4


def test_a_hub_string_without_revision_means_main():
    assert parse_source("hub:org/name") == HubSource("org/name", "main")
    assert parse_source("hub:gpt2@v1.0") == HubSource("gpt2", "v1.0")


def test_a_pypi_string_names_project_version_member_and_hash():
    source = parse_source(f"pypi:some-pkg==1.0.post1/a/b c.json#sha256={SHA.upper()}")
    assert source == PypiSource("some-pkg", "1.0.post1", "a/b c.json", SHA)
    assert source.canonical == "pypi:some-pkg==1.0.post1/a/b c.json"


def test_a_path_is_made_absolute_and_knows_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert parse_source("path:~/x/../m") == PathSource(tmp_path / "m")
    assert parse_source("path:tmp/m") == PathSource(Path("/tmp/m"))


def test_what_is_recorded_of_a_path_never_names_the_machine(monkeypatch, tmp_path):
    home, here = tmp_path / "home", tmp_path / "home" / "project"
    here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert shown(here / "data" / "a.json") == "data/a.json"
    assert shown(here) == "."
    assert shown(home / "models" / "m") == "~/models/m"
    assert shown(tmp_path / "elsewhere") == "../../elsewhere"
    assert parse_source(f"path:{home}/models/m").canonical == "path:~/models/m"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hub:", "must be hub:org/name"),
        ("hub:a/b/c", "must be hub:org/name"),
        ("hub:a/b@", "must be hub:org/name"),
        ("hub:a/b c", "must be hub:org/name"),
        ("hubb:a/b", "did you mean 'hub'?"),
        ("https://x/y", "must start with hub:, path: or pypi:"),
        ("plain", "must start with hub:, path: or pypi:"),
        ("path:", "must be path:FILE or path:FOLDER"),
        ("path: ", "must be path:FILE or path:FOLDER"),
        ("path:~no-such-user-here/x", "no such home folder"),
        ("pypi:a/b", "must be pypi:project==version/member#sha256="),
        ("pypi:a==1", "must be pypi:project==version/member#sha256="),
        ("pypi:--index-url==1/x", "must be pypi:project==version/member#sha256="),
        ("pypi:a==1 --pre/x", "must be pypi:project==version/member#sha256="),
        ("pypi:a==1/x", "add #sha256=<64 hex digits>"),
        ("pypi:a==1/x#sha256=12", "must be #sha256=<64 hex digits>"),
        (f"pypi:a==1/x#md5={SHA}", "must be #sha256=<64 hex digits>"),
        (f"pypi:a==1/../x#sha256={SHA}", "without '..'"),
        (f"pypi:a==1//etc/x#sha256={SHA}", "without '..'"),
        (f"pypi:a==1/x/#sha256={SHA}", "without '..'"),
        (f"pypi:a==1/x\\y#sha256={SHA}", "without '..'"),
    ],
)
def test_a_malformed_string_says_what_it_must_be(fails, text, says):
    message = fails(parse_source, text)
    assert says in message
    assert f"'{text}'" in message


def test_a_deleted_current_folder_is_not_needed_for_hub_strings(monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert parse_source("hub:a/b").canonical == "hub:a/b"
    os.chdir("/")
