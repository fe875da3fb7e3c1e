"""A failure stays with the runs that it concerns."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from loracle.errors import Interrupted, NonFiniteError, OutOfMemory, UsageError
from loracle.runner.active_run import ActiveRun, isolate_failure


def run_named(name: str) -> ActiveRun:
    statuses: list[tuple[str, str]] = []
    folder = SimpleNamespace(
        path=Path("runs") / name,
        set_status=lambda status, error: statuses.append((status, error)),
        statuses=statuses,
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


def test_a_signal_is_nobodys_failure():
    run = run_named("a")
    for runs in (run, [run]):
        with pytest.raises(Interrupted), isolate_failure(runs):
            raise Interrupted("interrupted by SIGINT")
    assert run.is_open
