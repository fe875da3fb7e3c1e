"""The first signal is noted, a later one ends the process, and the caller's handlers come back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from loracle.errors import Interrupted
from loracle.runner import signals
from loracle.runner.signals import StopRequest

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in HANDLED]


@pytest.fixture(autouse=True)
def hangups_are_not_ignored():
    """The suite itself may run under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_is_noted_and_raised_where_asked(number):
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.received is number
        with pytest.raises(Interrupted, match=rf"^interrupted by {number.name}$"):
            stop.check()


def test_a_hangup_that_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_come_together_are_one_request():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received is signal.SIGTERM


@pytest.fixture
def interruptible():
    """Python's own SIGINT; a shell starts its background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_later_signal_goes_to_the_callers_handler(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = handlers()
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGINT
        now[0] += 1.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert handlers() == before
    assert handlers() == before


def test_the_handlers_come_back_without_a_signal_and_after_an_error():
    before = handlers()
    with StopRequest():
        pass
    assert handlers() == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert handlers() == before


def test_a_later_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from loracle.runner import signals\n"
        "signals._TOGETHER_S = 0.1\n"
        "with signals. StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.received.name, flush=True)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "SIGTERM\n"
    assert done.returncode == -signal.SIGTERM


def test_outside_the_main_thread_signals_stay_the_callers():
    before, seen = handlers(), []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(handlers())
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
