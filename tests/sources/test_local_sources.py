from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from loracle.data.rows import READERS
from loracle.sources import (
    cache_folder,
    folders,
    local,
    model_architecture,
    resolve_data,
    resolve_model,
)


def test_a_model_folder_is_used_where_it_is(model_folder, monkeypatch, cache):
    monkeypatch.chdir(model_folder.parent)
    found = resolve_model("path:model")
    assert (found.path, found.source) == (model_folder, "path:model")
    assert not cache.exists()
    assert model_architecture("path:model")["hidden_size"] == 64


def test_the_revision_of_a_folder_is_its_content_and_nothing_else(model_folder, tmp_path):
    one = resolve_model(f"path:{model_folder}").revision
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(model_folder, copy)
    (copy / "README.md").write_text("not read by Transformers")
    assert resolve_model(f"path:{copy}").revision == one
    (copy / "tokenizer.json").write_text('{"changed": 1}')
    changed = resolve_model(f"path:{copy}").revision
    assert changed != one
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    assert resolve_model(f"path:{copy}").revision not in (one, changed)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", "no config.json in it"),
        ("model.safetensors", "no *.safetensors weights in it"),
        ("tokenizer.json", "no tokenizer in it (tokenizer.json, tokenizer.model)"),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_missing(model_folder, fails, file, says):
    (model_folder / file).unlink()
    (model_folder / "pytorch_model.bin").write_text("")
    message = fails(resolve_model, f"path:{model_folder}")
    assert says in message
    assert "model: " in message


def test_a_missing_shard_is_named(model_folder, fails):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model_folder / "model.safetensors").rename(model_folder / "model-1.safetensors")
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of its weight files missing (model-2.safetensors)" in fails(
        resolve_model, f"path:{model_folder}"
    )
    (model_folder / "model-2.safetensors").write_text("")
    resolve_model(f"path:{model_folder}")


def test_nothing_there_is_one_line(fails, tmp_path):
    assert fails(resolve_model, f"path:{tmp_path}/none").endswith("none: no such folder or file")
    assert fails(resolve_data, f"path:{tmp_path}/none").endswith("none: no such file or folder")
    assert "none" in fails(model_architecture, f"path:{tmp_path}/none")


def test_a_file_that_is_no_gguf_is_no_model(fails, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    message = fails(resolve_model, f"path:{tmp_path}/model.safetensors")
    assert "a model is a folder or a .gguf file" in message


def test_of_several_gguf_files_one_must_be_named(fails, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("")
    message = fails(resolve_model, f"path:{tmp_path}")
    assert "holds 2 GGUF files (a.gguf, b.gguf); name one of them" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
    ],
)
def test_a_broken_config_is_one_line(model_folder, fails, text, says):
    (model_folder / "config.json").write_text(text)
    message = fails(model_architecture, f"path:{model_folder}")
    assert says in message
    assert "config.json" in message


def test_a_data_file_is_pinned_by_its_content(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}\n")
    found = resolve_data("path:a.jsonl")
    assert (found.path, found.source) == (tmp_path / "a.jsonl", "path:a.jsonl")
    assert found.revision == f"sha256:{hashlib.sha256(b'{}' + bytes([10])).hexdigest()}"


def test_a_data_folder_is_pinned_by_its_data_files(tmp_path, fails):
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    message = fails(resolve_data, f"path:{folder}")
    assert "no .parquet, .jsonl, .ndjson, .json, .csv, .tsv file" in message
    (folder / "deep" / "a.json").write_text("[]")
    one = resolve_data(f"path:{folder}")
    (folder / "notes.txt").write_text("not data")
    assert resolve_data(f"path:{folder}") == one
    (folder / "b.csv").write_text("x")
    assert resolve_data(f"path:{folder}").revision != one.revision


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title])
def test_every_file_that_can_be_read_is_a_data_file(tmp_path, suffix, spell):
    file = tmp_path / f"a{spell(suffix)}"
    file.write_text("[]")
    assert folders.require_data_files(tmp_path, name="here") == [file]


def test_hashing_something_large_is_announced(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(local, "_ANNOUNCED_BYTES", 1)
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("[]")
    resolve_data("path:a.json", progress=lines.append)
    assert lines == ["hashing path:a.json (0.0 GiB)"]


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, fails, monkeypatch):
    (tmp_path / "a.json").write_text("[]")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert fails(resolve_data, f"path:{tmp_path}/a.json").endswith(
        "cannot be read (Permission denied)"
    )


def test_a_data_file_s_name_need_not_be_utf_8(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.json")).write_text("[]")
    first = resolve_data(f"path:{folder}").revision
    (folder / os.fsdecode(b"\xff.json")).rename(folder / os.fsdecode(b"\xfe.json"))
    assert resolve_data(f"path:{folder}").revision != first


def test_the_card_of_a_data_folder_is_part_of_its_revision(tmp_path):
    """It names the files that are read, and their delimiter."""
    (tmp_path / "rows.csv").write_text("instruction;input;output\na;;b\n")
    revisions = [resolve_data(f"path:{tmp_path}").revision]
    for delimiter in ";,":
        card = f"---\nconfigs: [{{data_files: rows.csv, sep: '{delimiter}'}}]\n---\n"
        (tmp_path / "README.md").write_text(card)
        revisions.append(resolve_data(f"path:{tmp_path}").revision)
    assert len(set(revisions)) == 3


@pytest.mark.parametrize("name", ["\udcff", "\x1b[2J", "\u202efdp"])
def test_a_folder_whose_name_is_no_text_is_one_line(tmp_path, monkeypatch, fails, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    code = f"holds the character U+{ord(name[0]):04X}"
    assert code in fails(resolve_data, "path:rows.json")
    assert code in fails(resolve_model, f"path:{folder}")
    monkeypatch.setenv("LORACLE_CACHE", str(folder))
    assert code in fails(cache_folder)
