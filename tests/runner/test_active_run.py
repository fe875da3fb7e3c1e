"""A failure stays with the runs that it concerns."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from loracle.errors import (
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    RunFailed,
    UnexpectedError,
    UsageError,
)
from loracle.runner.active_run import ActiveRun, isolate_failure


def run_named(name: str) -> ActiveRun:
    statuses: list[tuple[str, str]] = []
    folder = SimpleNamespace(
        path=Path("runs") / name,
        set_status=lambda status, error: statuses.append((status, error)),
        statuses=statuses,
        texts=(texts := {}),
        write_text=texts.__setitem__,
    )
    return ActiveRun(
        shared=None,
        prepared=SimpleNamespace(name=name, folder=folder),
        state=SimpleNamespace(failure=None),
        environment={},
        memory=None,
        probe=None,
        tracker=SimpleNamespace(finish=lambda _code: None),
    )


def test_whatever_goes_wrong_in_the_work_of_one_run_is_its_failure():
    run = run_named("a")
    with isolate_failure(run):
        raise UsageError("runs/a: the disk is full")
    assert not run.is_open
    assert run.folder.statuses == [("failed", "a: the disk is full")]
    assert run.state.failure == "runs/a: the disk is full"


def test_running_out_of_memory_fails_every_open_run_of_a_shared_pass():
    failed, first, second = map(run_named, "abc")
    before = failed.error = NonFiniteError("step 3: the loss is nan")
    with isolate_failure([failed, first, second]):
        raise MemoryError
    assert failed.error is before
    assert isinstance(first.error, OutOfMemory)
    assert first.error is second.error
    assert str(first.error).startswith("evaluation: out of memory; lower eval.batch_tokens")


@pytest.mark.parametrize("names", ["a", "ab"])
def test_another_error_of_a_shared_pass_concerns_the_base(names):
    runs = [run_named(name) for name in names]
    with pytest.raises(UsageError), isolate_failure(runs):
        raise UsageError("no such tokenizer")
    assert all(run.is_open for run in runs)


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (KeyError("rope\ntheta"), UnexpectedError, r"KeyError: 'rope\ntheta'"),
        (RuntimeError("a\n  b"), UnexpectedError, "RuntimeError: a b"),
        (RecursionError(), UnexpectedError, "RecursionError"),
        (ValueError("x" * 5000), UnexpectedError, "ValueError: " + "x" * 400 + "..."),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), UnexpectedError, "UnicodeDecodeError"),
        (RuntimeError("could not create a primitive"), OutOfMemory, "a: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory, "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfMemory, "a: out of memory"),
        (ImportError("x.so: failed to map segment"), OutOfMemory, "out of memory (ImportError: x"),
        (SystemError("std::bad_alloc"), OutOfMemory, "out of memory (SystemError: std::bad"),
        (OSError(errno.ENOSPC, "No space"), RunFailed, "the disk is full; free some space"),
    ],
)
@pytest.mark.parametrize("is_shared", [False, True])
def test_what_a_library_raises_is_a_failure_of_one_line_and_a_traceback(
    error, kind, line, is_shared
):
    run = run_named("a")
    with isolate_failure([run] if is_shared else run):
        raise error
    assert type(run.error) is kind
    assert run.error.exit_code == 1
    ((status, said),) = run.folder.statuses
    assert status == "failed"
    assert line.removeprefix("a: ") in said
    assert "\n" not in said
    if kind is not OutOfMemory or not line.startswith("a: "):
        return
    assert run.folder.texts == {}


def test_a_traceback_names_no_place_of_this_machine(tmp_path, monkeypatch):
    home = tmp_path / "wilhelmina"
    monkeypatch.setenv("HOME", str(home))
    run = run_named("a")
    with isolate_failure(run):
        raise FileNotFoundError(errno.ENOENT, "none", str(home / "notes" / "x.txt"))
    text = run.folder.texts["traceback.txt"]
    assert text.startswith("Traceback (most recent call last):\n")
    assert '  File "loracle/runner/active_run.py", line ' in text
    assert "~/notes/x.txt" in text
    for place in (str(home), str(Path(__file__).parents[2])):
        assert place not in text
        assert place not in str(run.error)
    assert str(run.error).endswith("(traceback in runs/a/traceback.txt)")


def test_a_signal_is_nobodys_failure():
    run = run_named("a")
    for runs in (run, [run]):
        with pytest.raises(Interrupted), isolate_failure(runs):
            raise Interrupted("interrupted by SIGINT")
    assert run.is_open
