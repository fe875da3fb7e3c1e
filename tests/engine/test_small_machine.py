"""Few processes and no temporary folder are noticed, and done without."""

import os
import tempfile
import threading

import pytest
import torch

from loracle.engine import small_machine
from loracle.engine.small_machine import (
    can_start_threads,
    find_temporary_folder,
    go_without_threads,
)
from loracle.forecast import cases


@pytest.fixture
def refused(monkeypatch):
    """A machine on which this process may have two more threads."""
    start, started = threading.Thread.start, []

    def starting(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    return started


def test_here_threads_start_and_end_again():
    before = threading.active_count()
    assert can_start_threads()
    assert threading.active_count() == before


def test_too_few_threads_are_noticed_and_none_is_left(refused):
    assert not can_start_threads()
    assert len(refused) == 2
    assert not any(thread.is_alive() for thread in refused)


def test_without_threads_the_libraries_are_told_before_they_are_imported(monkeypatch):
    for key in small_machine._ONE_THREAD:
        monkeypatch.delenv(key, raising=False)
    go_without_threads()
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "1"
    for key in small_machine._ONE_THREAD:
        monkeypatch.delenv(key)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_an_ordinary_machine_is_left_as_it_is(monkeypatch, tmp_path):
    before = dict(os.environ)
    assert small_machine.fit_machine(lambda: tmp_path) == []
    assert dict(os.environ) == before
    monkeypatch.setattr(small_machine, "can_start_threads", lambda: False)
    monkeypatch.setattr(os, "environ", {})
    (said,) = small_machine.fit_machine(lambda: tmp_path)
    assert said.startswith("few processes are allowed here")
    assert os.environ["RAYON_NUM_THREADS"] == "1"


@pytest.mark.parametrize("fault", ["threads", "semaphores", "accelerator"])
def test_forecasts_do_without_processes(monkeypatch, fault):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    if fault == "threads":
        monkeypatch.setattr(cases, "can_start_threads", lambda: False)
    elif fault == "accelerator":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    else:

        def no_semaphores(*_given, **_settings):
            raise FileNotFoundError(2, "No such file or directory", "/dev/shm")

        monkeypatch.setattr(cases, "ProcessPoolExecutor", no_semaphores)
    # A lambda could not go to another process.
    assert cases.in_processes(lambda item: item + 1, [1, 2, 3]) == [2, 3, 4]


@pytest.fixture
def no_usual_place(monkeypatch, tmp_path):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.usefixtures("no_usual_place")
def test_the_cache_holds_temporary_files_if_nothing_else_does(tmp_path):
    find_temporary_folder(lambda: tmp_path / "cache" / "tmp")
    assert tempfile.tempdir == str(tmp_path / "cache" / "tmp")


@pytest.mark.usefixtures("no_usual_place")
def test_without_a_home_either_nothing_is_raised_yet(tmp_path):
    (tmp_path / "file").touch()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for fallback in (no_home, lambda: tmp_path / "file" / "tmp"):
        find_temporary_folder(fallback)
        assert tempfile.tempdir is None
