from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loracle.errors import SourceError
from loracle.sources import cache as cache_module
from loracle.sources import cache_folder
from loracle.sources.cache import MANIFEST, obtain


@pytest.fixture
def entry(cache) -> Path:
    return cache / "data" / "thing-1.0-abc"


class Build:
    """A build that writes one file and counts how often it ran."""

    def __init__(self, content: str = "content", delay_s: float = 0.0):
        self.content, self.delay_s, self.count = content, delay_s, 0

    def __call__(self, folder: Path, scratch: Path) -> None:
        self.count += 1
        (scratch / "download").write_text("x" * 100)
        (folder / "file.json").write_text(self.content)
        time.sleep(self.delay_s)


def get(entry, build, lines=None, revision="sha256:1"):
    say = lines.append if lines is not None else (lambda line: None)
    return obtain(
        entry, source="pypi:thing==1.0/file.json", revision=revision, build=build, progress=say
    )


def hidden(entry: Path) -> list[str]:
    return [path.name for path in entry.parent.iterdir() if ".partial-" in path.name]


def forget_hashes(monkeypatch):
    """What a new process knows."""
    monkeypatch.setattr(cache_module, "_hashed", {})
    cache_module._sha256.cache_clear()


def test_the_cache_is_where_the_environment_says_else_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORACLE_CACHE", "~/c")
    assert cache_folder() == tmp_path / "c"
    monkeypatch.setenv("LORACLE_CACHE", "")
    assert cache_folder() == tmp_path / ".cache" / "loracle"


def test_an_entry_is_built_once_and_leaves_nothing_beside_it(entry, lines):
    build = Build()
    assert get(entry, build, lines) == entry
    assert get(entry, build, lines) == entry
    assert build.count == 1
    assert lines == []
    assert (entry / "file.json").read_text() == "content"
    assert sorted(path.name for path in entry.iterdir()) == [MANIFEST, "file.json"]
    assert hidden(entry) == []


def test_the_manifest_names_source_revision_size_and_hash_and_no_machine(entry):
    get(entry, Build("abc"))
    text = (entry / MANIFEST).read_text()
    manifest = json.loads(text)
    assert manifest["source"] == "pypi:thing==1.0/file.json"
    assert manifest["revision"] == "sha256:1"
    assert manifest["files"]["file.json"] == {
        "size_bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert str(entry.parent) not in text


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda e: (e / "file.json").write_text("cut"), "file.json holds 3 bytes, not 7"),
        (lambda e: (e / "file.json").unlink(), "file.json is missing"),
        (lambda e: (e / MANIFEST).unlink(), f"{MANIFEST} is missing"),
        (lambda e: (e / MANIFEST).write_text("{"), f"{MANIFEST} is not readable"),
        (lambda e: (e / MANIFEST).write_text("[]"), f"{MANIFEST} is not readable"),
        (lambda e: (e / MANIFEST).write_text('{"files": 1}'), f"{MANIFEST} is not readable"),
        (lambda e: (e / MANIFEST).write_bytes(b"\xff"), f"{MANIFEST} is not readable"),
    ],
)
def test_a_damaged_entry_is_noticed_and_rebuilt_with_one_line(entry, lines, damage, why):
    build = Build()
    get(entry, build)
    damage(entry)
    get(entry, build, lines)
    assert lines == [f"cache: thing-1.0-abc is damaged ({why}); rebuilding it"]
    assert build.count == 2
    assert (entry / "file.json").read_text() == "content"
    assert hidden(entry) == []


def test_a_flipped_byte_is_noticed_by_the_next_process(entry, lines, monkeypatch):
    build = Build()
    get(entry, build)
    (entry / "file.json").write_text("cOntent")
    forget_hashes(monkeypatch)
    get(entry, build, lines)
    assert lines == [
        "cache: thing-1.0-abc is damaged (file.json does not match its hash); rebuilding it"
    ]
    assert (entry / "file.json").read_text() == "content"


def test_files_are_hashed_once_per_process(entry, monkeypatch):
    get(entry, Build())
    forget_hashes(monkeypatch)
    hashed = []
    monkeypatch.setattr(
        cache_module, "sha256_file", lambda path: hashed.append(path.name) or _sha_of("content")
    )
    get(entry, Build())
    get(entry, Build())
    assert hashed == ["file.json"]


def test_a_file_over_the_limit_is_checked_by_size_alone(entry, monkeypatch):
    get(entry, Build())
    (entry / "file.json").write_text("cOntent")
    forget_hashes(monkeypatch)
    monkeypatch.setattr(cache_module, "_HASHED_ON_USE_BYTES", 7)
    build = Build()
    get(entry, build)
    assert build.count == 0


def _sha_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def test_another_revision_is_not_taken_for_the_one_asked_for(entry, lines):
    get(entry, Build("one"))
    get(entry, Build("two"), lines, revision="sha256:2")
    assert (entry / "file.json").read_text() == "two"
    assert len(lines) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SourceError("no")])
def test_a_build_that_stops_half_way_leaves_nothing(entry, error):
    def build(folder, scratch):
        (folder / "file.json").write_text("half")
        raise error

    with pytest.raises(type(error)):
        get(entry, build)
    assert not entry.exists()
    assert hidden(entry) == []


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from loracle.sources.cache import obtain
def build(folder, scratch):
    (folder / "file.json").write_text("half" if sys.argv[2] == "die" else str(os.getpid()))
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
obtain(Path(sys.argv[1]), source="s", revision="sha256:1", build=build, progress=print)
print((Path(sys.argv[1]) / "file.json").read_text())
"""


def test_a_killed_build_is_never_taken_for_an_entry_and_is_swept(entry):
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(entry), "die"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not entry.exists()
    assert len(hidden(entry)) == 1
    get(entry, Build())
    assert (entry / "file.json").read_text() == "content"
    assert hidden(entry) == []


def test_two_processes_build_an_entry_once(entry):
    command = [sys.executable, "-c", SCRIPT, str(entry), "live"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0][-1] == said[1][-1] == (entry / "file.json").read_text()


def test_who_waits_for_another_builder_says_so(entry, lines):
    build = Build(delay_s=0.4)
    other = threading.Thread(target=get, args=(entry, build))
    other.start()
    while build.count == 0:
        time.sleep(0.01)
    get(entry, build, lines)
    other.join()
    assert build.count == 1
    assert lines == ["cache: waiting for another process that builds thing-1.0-abc"]


def test_a_file_system_without_locks_still_caches(entry, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    build = Build()
    get(entry, build)
    get(entry, build)
    assert build.count == 1


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(entry, fails, number, says):
    def build(folder, scratch):
        raise OSError(number, os.strerror(number))

    message = fails(get, entry, build)
    assert says in message
    assert "LORACLE_CACHE" in message
    assert "thing-1.0-abc" in message
    assert not entry.exists()
    assert hidden(entry) == []


def test_a_lock_that_fails_for_another_reason_is_one_line(entry, monkeypatch, fails):
    def broken(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cache_module.fcntl, "flock", broken)
    assert "Input/output error" in fails(get, entry, Build())


def test_a_cache_that_cannot_be_written_is_one_line(entry, monkeypatch, fails):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "no permission to write there" in fails(get, entry, Build())


def test_a_file_in_the_way_of_the_cache_is_one_line(cache, entry, fails):
    cache.write_text("")
    assert "a file is where a folder should be" in fails(get, entry, Build())
