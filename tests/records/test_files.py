import errno
import json
import os
import stat

import pytest

from loracle.errors import NonFiniteError, RunFolderError
from loracle.records.files import (
    disk_faults,
    read_json,
    read_jsonl,
    strict_json,
    write_durably,
)


def test_a_file_is_replaced_and_no_temporary_file_stays(tmp_path):
    path = tmp_path / "a.json"
    write_durably(path, b"one")
    write_durably(path, "zwölf".encode())
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_the_old_file_and_says_so_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_durably(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"a\.json: cannot be written: the disk is full") as e:
        write_durably(path, b"new")
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "a file is where a folder should be"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_file_system_refuses_is_said_in_words(tmp_path, number, words):
    with pytest.raises(RunFolderError, match=words), disk_faults(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch):
    real = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_durably(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_folder_that_fails_to_sync_is_an_error(tmp_path, monkeypatch):
    real = os.fsync

    def failing_disk(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing_disk)
    with pytest.raises(RunFolderError, match="Input/output error"):
        write_durably(tmp_path / "a", b"x")


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"quality": {"tuned": [1.0, float("nan")]}}, "quality.tuned.1 is nan"),
        ({"loss": float("-inf")}, "loss is -inf"),
        (float("inf"), "value is inf"),
    ],
)
def test_a_value_that_is_not_finite_is_named_and_never_written(data, key):
    with pytest.raises(NonFiniteError, match=rf"result\.json: {key}; .* is null"):
        strict_json(data, origin="result.json")


def test_json_keeps_the_order_of_its_keys_and_every_letter():
    data = {"b": None, "a": "ü", "c": [1, 2.5, True]}
    text = strict_json(data, origin="x")
    assert text == '{"b": null, "a": "ü", "c": [1, 2.5, true]}'
    assert json.loads(text) == data


def test_a_last_line_that_was_cut_short_is_not_a_row(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_before_the_last_is_named_by_its_number(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"steps\.jsonl:2: not JSON"):
        read_jsonl(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(RunFolderError, match=r"list\.json: must be a JSON object, got list"):
        read_json(tmp_path / "list.json")
    with pytest.raises(RunFolderError, match=r"gone\.json: cannot be read \(No such file"):
        read_json(tmp_path / "gone.json")
    assert read_jsonl(tmp_path / "gone.jsonl") == []
