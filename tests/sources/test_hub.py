from __future__ import annotations

import errno
import importlib
import json
import re
import socket
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from loracle.sources import catalog, model_architecture, resolve_data, resolve_model

# The library of its requests: httpx2, or httpx in versions before 2.
http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_FILES = {
    "config.json": '{"model_type": "llama", "hidden_size": 8}',
    "model.safetensors": "",
    "tokenizer.json": "{}",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the download of a snapshot; keeps what it was asked for."""
    asked = {}

    def serve(files: dict[str, str]) -> dict:
        def download(repo_id, dry_run=False, **options):
            if dry_run:
                return []
            asked.update(options, repo_id=repo_id)
            folder = tmp_path / "snapshots" / COMMIT
            for name, text in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return serve


def test_a_model_is_pinned_to_the_commit_that_was_found(hub, lines):
    asked = hub(MODEL_FILES)
    found = resolve_model("hub:org/name", progress=lines.append)
    assert (found.source, found.revision) == ("hub:org/name", COMMIT)
    assert found.path.name == COMMIT
    assert lines == ["looking up hub:org/name@main"]
    assert (asked["repo_id"], asked["revision"], asked["repo_type"]) == (
        "org/name",
        "main",
        "model",
    )


def test_only_what_a_model_needs_is_asked_for(hub):
    from huggingface_hub.utils import filter_repo_objects

    asked = hub(MODEL_FILES)
    resolve_model("hub:org/name@v2")
    wanted = [
        *("config.json", "generation_config.json", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "chat_template.jinja"),
    ]
    unwanted = [
        *("pytorch_model.bin", "modeling_x.py", "original/model.safetensors", "README.md"),
        *("consolidated.safetensors", "tf_model.h5", "model.onnx", "onnx/tokenizer.json"),
    ]
    chosen = filter_repo_objects(
        wanted + unwanted,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(chosen) == wanted


def test_data_in_any_format_is_asked_for_with_the_card_that_names_it(hub):
    from huggingface_hub.utils import filter_repo_objects

    asked = hub({"train.parquet": "x"})
    resolve_data("hub:org/name")
    wanted = ["README.md", "a.TSV", "b.ndjson", "c.Csv", "deep/d.parquet", "e.JSONL", "f.json"]
    chosen = filter_repo_objects(
        [*wanted, "state.json", "notes.txt", "deep/README.md"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(chosen) == wanted


def test_a_key_of_the_catalog_is_looked_up_on_the_hub(hub):
    asked = hub({"train.parquet": "x"})
    found = resolve_data("alpaca")
    assert catalog().data["alpaca"].source == f"{found.source}@main"
    assert (asked["repo_id"], asked["repo_type"]) == ("tatsu-lab/alpaca", "dataset")


def test_one_data_file_is_returned_itself_and_several_as_their_folder(hub):
    hub({"data/train.parquet": "x", "dataset_infos.json": "{}", "README.md": ""})
    assert resolve_data("hub:org/name").path.name == "train.parquet"
    hub({"data/test.parquet": "x"})
    found = resolve_data("hub:org/name")
    assert (found.path.name, found.revision) == (COMMIT, COMMIT)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "no config.json in it"),
        ("model.safetensors", "no *.safetensors weights in it"),
        ("tokenizer.json", "no tokenizer in it"),
    ],
)
def test_a_repository_that_is_no_model_says_what_is_missing(hub, fails, missing, says):
    hub({name: text for name, text in MODEL_FILES.items() if name != missing})
    message = fails(resolve_model, "hub:org/name")
    assert message.startswith("hub:org/name@main: ")
    assert says in message


def test_a_data_repository_without_data_is_refused(hub, fails):
    hub({"README.md": "", "dataset_infos.json": "{}"})
    message = fails(resolve_data, "hub:org/name@x")
    assert "no .parquet, .jsonl, .ndjson, .json, .csv, .tsv file" in message


def http_error(kind, status: int):
    request = http.Request("GET", "https://hub.invalid/?token=hf_secret")
    response = http.Response(status, request=request)
    return kind(f"{status}\nfor url {request.url}", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(errors.GatedRepoError, 403), "accept its terms on the page of meta-llama/L"),
        (http_error(errors.GatedRepoError, 403), "tinyllama-1.1b needs no access"),
        (http_error(errors.RepositoryNotFoundError, 404), "no such model repository"),
        (http_error(errors.RevisionNotFoundError, 404), "no revision 'v9' in this repository"),
        (http_error(errors.DisabledRepoError, 403), "has disabled this repository"),
        (http_error(errors.RemoteEntryNotFoundError, 404), "no config.json in it"),
        (http_error(errors.HfHubHTTPError, 503), "HTTP status 503"),
        (errors.LocalEntryNotFoundError("a\nb"), "no route to the hub"),
        (errors.IncompleteSnapshotError("a\nb", snapshot_path="x"), "no route to the hub"),
        (errors.OfflineModeIsEnabled("a"), "HF_HUB_OFFLINE"),
        (http.ConnectError("a\nb"), "no route to the hub"),
        (http.ProxyError("a"), "no route to the hub"),
        (errors.HFValidationError("a\nb"), "not a valid repository name"),
        (RuntimeError("xet\nbroke"), "the download broke off"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "no permission to write there"),
    ],
)
@pytest.mark.parametrize("call", [resolve_model, model_architecture])
def test_what_the_client_raises_becomes_one_line(monkeypatch, fails, call, error, says):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    message = fails(call, "hub:meta-llama/L@v9")
    assert message.startswith("hub:meta-llama/L@v9: ")
    assert says in message
    assert "hf_secret" not in message


def test_gated_data_does_not_suggest_a_model(monkeypatch, fails):
    def refuse(*args, **options):
        raise http_error(errors.GatedRepoError, 403)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = fails(resolve_data, "hub:a/b")
    assert "hf auth login" in message
    assert "tinyllama" not in message


@pytest.fixture
def hub_cache(monkeypatch, tmp_path) -> Path:
    """An empty cache for the real client, and no network for it."""

    def unreachable(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    # The client waits 23 seconds between its attempts.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    huggingface_hub.utils.close_session()
    return folder


def put_snapshot(
    hub_cache: Path, files: dict[str, str], *, repo: str = "models--org--name"
) -> Path:
    folder = hub_cache / repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (hub_cache / repo / "refs").mkdir()
    (hub_cache / repo / "refs" / "main").write_text(COMMIT)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("switched_off", [True, False])
def test_the_real_client_without_a_route_is_one_line(hub_cache, fails, monkeypatch, switched_off):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", switched_off)
    for call in (resolve_model, resolve_data, model_architecture):
        assert "no route to the hub" in fails(call, "hub:org/name")


@pytest.mark.parametrize("switched_off", [True, False])
@pytest.mark.parametrize(
    "revision",
    [
        "main",
        pytest.param(
            COMMIT,
            marks=pytest.mark.skipif(
                version("huggingface_hub").startswith("1."),
                reason="that client wants its own listing of a commit beside the snapshot",
            ),
        ),
    ],
)
def test_the_real_client_without_a_route_uses_what_is_cached(
    hub_cache, monkeypatch, switched_off, revision
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", switched_off)
    folder = put_snapshot(hub_cache, MODEL_FILES)
    found = resolve_model(f"hub:org/name@{revision}")
    assert (found.path, found.revision) == (folder, COMMIT)
    assert model_architecture(f"hub:org/name@{revision}") == json.loads(MODEL_FILES["config.json"])


def test_a_partial_snapshot_in_the_clients_cache_is_not_used(hub_cache, fails):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    put_snapshot(
        hub_cache,
        {
            "config.json": "{}",
            "tokenizer.json": "{}",
            "model-1.safetensors": "",
            "model.safetensors.index.json": json.dumps(index),
        },
    )
    message = fails(resolve_model, "hub:org/name")
    assert "1 of its weight files missing (model-2.safetensors)" in message


def sized(monkeypatch, gib, *, cached=False):
    """Stands in for what the client says of a repository's files before they are fetched."""
    from huggingface_hub.file_download import DryRunFileInfo

    def say(_repo, *, dry_run=False, **_options):
        assert dry_run, "fetched without asking"
        size = int(gib * 2**30)
        return [DryRunFileInfo(COMMIT, size, "model.safetensors", "", cached, not cached)]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", say)


def test_a_model_that_the_disk_cannot_take_is_not_fetched(monkeypatch, fails):
    sized(monkeypatch, 1e9)
    line = fails(resolve_model, "hub:org/name")
    assert re.search(
        r"the download needs 1000000000.0 GiB, and [\d.]+ GiB are free .* HF_HOME", line
    )


def test_what_is_cached_takes_no_room(monkeypatch):
    sized(monkeypatch, 1e9, cached=True)
    with pytest.raises(AssertionError, match="fetched without asking"):
        resolve_model("hub:org/name")
