import getpass
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loracle.config.files import load_config
from loracle.engine import environment
from loracle.engine.environment import capture_environment
from loracle.records.signature import environment_differences, signature, without_folder


@pytest.fixture(scope="module")
def captured():
    return capture_environment(device="cpu", dtype="bfloat16")


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "src" / "loracle").mkdir(parents=True)
    (tmp_path / "src" / "loracle" / "__init__.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text("x\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


def test_versions_are_those_installed(captured):
    versions = captured["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == version("numpy")
    assert list(versions) == [
        "torch", "transformers", "peft", "accelerate",
        "tokenizers", "safetensors", "sacrebleu", "numpy", "wandb",
    ]  # fmt: skip
    assert captured["python"] == platform.python_version()


def test_the_machine_is_described(captured):
    assert captured["cpu"]["model"]
    assert captured["cpu"]["logical_cores"] == os.cpu_count()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert captured["memory_gib"] == pytest.approx(physical, abs=0.01)
    assert captured["device"] == {"name": captured["cpu"]["model"], "dtype": "bfloat16"}
    assert captured["torch_settings"]["num_threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", captured["captured_at"])


def test_settings_that_change_bits_are_seen():
    threads = torch.get_num_threads()
    before = capture_environment(device="cpu", dtype="float32")
    try:
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        after = capture_environment(device="cpu", dtype="float32")
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
    assert environment_differences(before, after) == [
        "torch_settings.float32_matmul_precision: 'highest' -> 'medium'",
        f"torch_settings.num_threads: {threads} -> {threads + 1}",
    ]


def test_nothing_names_a_person_or_a_place(captured, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-token")
    text = json.dumps(capture_environment(device="cpu", dtype="float32"))
    assert not re.search(r'(^|[\s="])/\w', text)
    for private in (str(Path.home()), str(Path.cwd()), "secret-token"):
        assert private not in text
    # As a word: a host may be called "vm" and a release contain those letters.
    for private in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"\b{re.escape(private)}\b", text)


def test_how_torch_was_built_is_told_without_the_builders_paths(monkeypatch):
    shown = (
        "PyTorch built with:\n  - GCC 13.3\n  - Build settings: BLAS_INFO=mkl, "
        "CXX_COMPILER=/opt/rh/c++, CXX_FLAGS= -O2 -I/home/builder, USE_CUDA=0, \n"
    )
    monkeypatch.setattr(torch.__config__, "show", lambda: shown)
    built = capture_environment(device="cpu", dtype="float32")["torch_build"]
    assert built == ["GCC 13.3", "Build settings: BLAS_INFO=mkl", "USE_CUDA=0"]


def test_gpus_are_described(monkeypatch):
    gpus = [
        SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5),
        SimpleNamespace(name="NVIDIA A100", total_memory=80 * 2**30, major=8, minor=0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(environment, "_output", lambda *words, env=None: "580.65\n580.65")
    first = capture_environment(device="cuda", dtype="float16")
    assert first["device"] == {"name": "Tesla T4", "dtype": "float16"}
    assert first["gpus"][1] == {
        "name": "NVIDIA A100", "memory_gib": 80.0, "compute_capability": "8.0",
    }  # fmt: skip
    assert first["cuda"] == {"runtime": "13.0", "cudnn": 91002, "driver": "580.65"}
    second = capture_environment(device="cuda:1", dtype="float16")
    assert second["device"]["name"] == "NVIDIA A100"


def test_without_a_gpu_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    captured = capture_environment(device="cpu", dtype="float32")
    assert captured["gpus"] == []
    assert captured["cuda"] is None


def test_a_clean_checkout_has_a_commit(checkout):
    result = environment._checkout(checkout)
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"])
    assert result["dirty"] is False


def test_what_can_change_a_number_makes_a_checkout_dirty(checkout):
    (checkout / "README.md").write_text("y\n")
    assert environment._checkout(checkout)["dirty"] is False
    (checkout / "src" / "loracle" / "new.py").write_text("y = 2\n")
    assert environment._checkout(checkout)["dirty"] is True


def test_git_variables_do_not_lead_to_another_repository(checkout, monkeypatch):
    expected = environment._checkout(checkout)
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    assert environment._checkout(checkout) == expected


def test_the_users_own_repository_is_not_ours(checkout):
    site = checkout / ".venv" / "lib" / "python3.11"
    (site / "site-packages" / "loracle").mkdir(parents=True)
    unknown = {"commit": None, "dirty": None}
    assert environment._checkout(site) == unknown
    shutil.rmtree(checkout / "src")
    assert environment._checkout(checkout) == unknown


def test_a_checkout_that_git_cannot_read_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / "src" / "loracle").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    assert environment._checkout(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._git(tmp_path, "status") is None


def test_a_package_that_is_not_installed_is_null():
    assert environment.package_version("no-such-package-here") is None


@pytest.mark.parametrize(
    ("system", "answer", "processor", "expected"),
    [
        ("Darwin", "Apple M3", "arm", "Apple M3"),
        ("Darwin", None, "arm", "arm64"),
        ("Linux", None, "", "arm64"),
        ("Windows", None, "Intel64 Family 6", "Intel64 Family 6"),
    ],
)
def test_a_cpu_without_a_model_name_is_named_by_the_system(
    monkeypatch, system, answer, processor, expected
):
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(environment, "_output", lambda *words, env=None: answer)
    assert environment.cpu_model() == expected


def known(**changes):
    captured = {
        "captured_at": "2026-01-01T00:00:00+00:00",
        "memory_gib": 16.0,
        "loracle": {"version": "0.1.0", "commit": "abc1234def", "dirty": False},
        "python": "3.11.7",
        "device": {"name": "AMD EPYC 9B14", "dtype": "bfloat16"},
        "torch_settings": {"num_threads": 2},
        "cuda": None,
        "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"},
    }
    return {**captured, **changes}


def sign(environment, **changes):
    given = {
        "config": load_config("demo"),
        "model": "smollm2-135m@bcc81830",
        "data": "9f86d081884c",
        "placement": "all-linear",
    }
    return signature(**{**given, **changes}, environment=environment)


def test_a_signature_says_what_the_result_is_a_result_of():
    digest = sign(known()).partition("|config:")[2].partition("|")[0]
    assert re.fullmatch("[0-9a-f]{12}", digest)
    assert sign(known()).replace(f"|config:{digest}", "") == (
        "model:smollm2-135m@bcc81830|data:9f86d081884c|placement:all-linear|r:16|alpha:32"
        "|dropout:0.1|steps:60|batch:8|lr:0.0003|schedule:cosine|tokens:512|seed:0"
        "|dtype:bfloat16|device:AMD-EPYC-9B14|threads:2|torch:2.13.0+cpu|transformers:5.23.0"
        "|peft:0.21.2|loracle:0.1.0|commit:abc1234"
    )


def test_a_signature_says_whether_a_gpu_repeats_and_older_ones_still_compare():
    """Without the item: a CPU, where operations repeat anyway, or a GPU where they do not."""
    off = known(torch_settings={"num_threads": 2, "deterministic_algorithms": False})
    on = known(torch_settings={"num_threads": 2, "deterministic_algorithms": True})
    assert sign(off) == sign(known())
    assert sign(on) == sign(off).replace("|threads:2|", "|threads:2|deterministic:yes|")
    assert environment_differences(off, on) == [
        "torch_settings.deterministic_algorithms: False -> True"
    ]
    asked = load_config("demo", overrides=["deterministic=true"])
    assert sign(on, config=asked) == sign(on)


def test_a_signature_tells_a_dirty_and_an_unknown_commit():
    dirty = known(loracle={"version": "0.1.0", "commit": "abc1234def", "dirty": True})
    assert sign(dirty).endswith("|commit:abc1234+dirty")
    installed = known(loracle={"version": "0.1.0", "commit": None, "dirty": None})
    assert sign(installed).endswith("|commit:n/a")


def test_a_signature_is_one_line_of_items_whatever_it_is_given():
    odd = known(device={"name": "a|b\n c", "dtype": "float32"})
    text = sign(odd, model="path:/home/someone/my model@x")
    assert "\n" not in text
    assert text.startswith("model:path:my-model@x|data:")
    assert dict(item.split(":", 1) for item in text.split("|"))["device"] == "a-b-c"


@pytest.mark.parametrize(
    "override",
    ["lora.rank=8", "lora.alpha=8", "lora.dropout=0.0", "train.max_steps=7", "train.batch_size=4",
     "train.learning_rate=1e-5", "train.schedule=linear", "data.max_tokens=64", "seed=3",
     "eval.max_examples=9", "eval.max_new_tokens=9", "train.weight_decay=0.1"],
)  # fmt: skip
def test_runs_that_differ_have_different_signatures(override):
    other = load_config("demo", overrides=[override])
    assert sign(known(), config=other) != sign(known())


def test_seeds_of_one_configuration_share_all_but_their_seed():
    other = load_config("demo", overrides=["seed=3", "data.source=path:elsewhere.json"])
    assert sign(known(), config=other) == sign(known()).replace("|seed:0|", "|seed:3|")


def test_environments_are_compared_by_what_changes_numbers():
    same = known(captured_at="2027-01-01T00:00:00+00:00", memory_gib=99.0)
    assert environment_differences(known(), same) == []
    other = known(
        device={"name": "Tesla T4", "dtype": "float16"},
        cuda={"driver": "580", "runtime": "13.0"},
        versions={"torch": "2.13.0+cpu", "transformers": "5.23.0"},
    )
    assert environment_differences(known(), other) == [
        "cuda.driver: None -> '580'",
        "cuda.runtime: None -> '13.0'",
        "device.dtype: 'bfloat16' -> 'float16'",
        "device.name: 'AMD EPYC 9B14' -> 'Tesla T4'",
        "versions.peft: '0.21.2' -> None",
    ]


def test_a_local_source_is_named_without_its_folder():
    assert without_folder("path:/home/someone/data.json") == "path:data.json"
    assert without_folder("hub:org/name@main") == "hub:org/name@main"
