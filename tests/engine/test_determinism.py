"""Same bits when repeated: chosen by the device, switched on for a run, and put back after it."""

import os
from contextlib import suppress

import pytest
import torch

from loracle.engine import determinism as module
from loracle.engine.determinism import determinism
from loracle.engine.environment import torch_settings
from loracle.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAME = "CUBLAS_WORKSPACE_CONFIG"


def switches():
    settings = torch_settings()
    return settings["deterministic_algorithms"], settings["cudnn_deterministic"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    monkeypatch.setattr(module, "_products_run", lambda device: True)
    yield
    os.environ.pop(NAME, None)


@pytest.mark.parametrize("requested", [None, True, False])
def test_a_cpu_needs_no_switch(requested):
    before = torch_settings()
    with determinism(CPU, requested=requested) as repeats:
        assert repeats
        assert torch_settings() == before
    assert NAME not in os.environ


@pytest.mark.parametrize(("requested", "repeats"), [(None, True), (True, True), (False, False)])
def test_a_gpu_is_switched_and_switched_back(requested, repeats):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    seen = []
    with suppress(KeyError), determinism(GPU, requested=requested) as works:
        seen += [works, *switches(), torch.utils.deterministic.fill_uninitialized_memory]
        raise KeyError
    assert seen == [repeats, repeats, repeats, filled and not repeats]
    assert switches() == (False, False)
    assert torch.utils.deterministic.fill_uninitialized_memory is filled
    assert os.environ.get(NAME) == (":4096:8" if repeats else None)


@pytest.mark.parametrize("late", [False, True])
def test_where_it_cannot_be_it_is_refused_if_asked_for_and_else_left(monkeypatch, late):
    if late:
        monkeypatch.setattr(module, "_products_run", lambda device: False)
    else:
        monkeypatch.setenv(NAME, ":0:0")
    with determinism(GPU, requested=None) as works:
        assert not works
        assert switches() == (False, False)
    with (
        pytest.raises(ConfigError, match=rf"^deterministic: needs {NAME}=:4096:8 .*=false$"),
        determinism(GPU, requested=True),
    ):
        raise AssertionError
    assert switches() == (False, False)
