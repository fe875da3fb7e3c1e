"""What this machine can do: said without a download, and true."""

import shutil
from collections import namedtuple

import pytest

from loracle.cli import doctor
from loracle.engine.environment import capture_environment


@pytest.fixture
def findings(place):
    """The findings by name, as another user sees them."""

    def look():
        with place.entered():
            return {finding.name: finding for finding in doctor.checkup()}

    return look


def test_the_command_exits_with_0_and_names_the_device_and_its_dtype(place):
    outcome = place.loracle("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    environment = capture_environment(device="cpu", dtype="float32")
    text = " ".join(outcome.out.split())
    assert environment["cpu"]["model"] in text
    assert "auto means " in text
    for name in ("packages", "memory", "allocator", "cache", "model hub", "W&B", "4-bit"):
        assert name in text


def test_nothing_is_missing_where_the_tests_run(findings):
    found = findings()
    assert {finding.state for finding in found.values()} <= {"ok", "limited"}
    assert found["packages"].state == "ok"
    assert "torch " in found["packages"].detail


def test_keys_and_tokens_are_seen_and_never_shown(findings, monkeypatch, place):
    before = findings()
    assert (before["model hub"].state, before["W&B"].state) == ("limited", "limited")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr(doctor, "has_key", lambda: True)
    after = findings()
    assert (after["model hub"].state, after["W&B"].state) == ("ok", "ok")
    assert "secret" not in str(after)


def test_a_hub_that_is_switched_off_is_said(findings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cached models only" in findings()["model hub"].detail


def test_too_little_disk_is_a_limit_and_a_cache_that_cannot_be_written_is_missing(
    findings, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(2**30, 2**30, 2**20))
    assert findings()["cache"].state == "limited"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    cache = findings()["cache"]
    assert (cache.state, cache.detail) == (
        "missing",
        "~/.cache/loracle is not writable; set LORACLE_CACHE",
    )


def test_an_old_cpu_is_a_limit(findings, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr("loracle.engine.device.cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(doctor, "keep_large_blocks", lambda: False)
    found = findings()
    assert found["CPU"].state == "limited"
    assert "runs use float32 here" in found["CPU"].detail
    assert found["allocator"].state == "limited"


def test_a_package_that_is_not_installed_and_gpus_are_named(findings, monkeypatch):
    environment = capture_environment(device="cpu", dtype="float32")
    environment["versions"] |= {"wandb": None}
    environment["gpus"] = [{"name": "Tesla T4", "memory_gib": 14.6, "compute_capability": "7.5"}]
    environment["memory_gib"] = 4.0
    monkeypatch.setattr(doctor, "capture_environment", lambda **_: environment)
    found = findings()
    assert found["packages"].state == "missing"
    assert found["packages"].detail.startswith("wandb not installed; found python ")
    assert (found["GPU"].state, found["GPU"].detail) == ("ok", "Tesla T4, 15 GiB")
    assert found["memory"].state == "limited"
