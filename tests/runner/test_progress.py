"""Plain lines where there is no terminal, a bar where there is one, and nothing read as markup."""

import io
import re

import pytest
from rich.console import Console

from loracle.runner import progress as progress_module
from loracle.runner.progress import Progress


def progress_of(*, terminal: bool) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    return Progress(Console(file=file, force_terminal=terminal, width=100)), file


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_phase_is_a_line_now_and_then(clock):
    progress, file = progress_of(terminal=False)
    with progress.phase("train", total=100) as advance:
        for _ in range(40):
            clock[0] += 1
            advance(detail="loss 1.5")
    lines = file.getvalue().splitlines()
    assert lines == [
        "train: 15/100  loss 1.5  ETA 85 s",
        "train: 30/100  loss 1.5  ETA 70 s",
        "train: 40/100  done in 40 s",
    ]


def test_the_rate_counts_only_what_was_done_this_time(clock):
    progress, file = progress_of(terminal=False)
    with progress.phase("train", total=100, done=60) as advance:
        clock[0] += 20
        advance(10)
    assert "train: 70/100    ETA 60 s" in file.getvalue().splitlines()[0]


def test_a_short_phase_is_one_line(clock):
    progress, file = progress_of(terminal=False)
    with progress.phase("answer", total=3) as advance:
        advance(3)
    assert file.getvalue() == "answer: 3/3  done in 0 s\n"


def test_a_phase_that_fails_does_not_say_done():
    progress, file = progress_of(terminal=False)
    with pytest.raises(ZeroDivisionError), progress.phase("train", total=3):
        raise ZeroDivisionError
    assert "done" not in file.getvalue()


def test_lines_of_a_log_hold_no_escape_codes(clock):
    progress, file = progress_of(terminal=False)
    progress.notice("resuming after step 3 of 8")
    with progress.phase("train", total=1) as advance:
        advance()
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_and_colons_are_text_and_not_markup(terminal):
    progress, file = progress_of(terminal=terminal)
    progress.notice("model [/tmp/x] has [red] and [/] and :x:")
    assert "model [/tmp/x] has [red] and [/] and :x:" in file.getvalue()


def test_on_a_terminal_there_is_a_bar_that_reaches_its_end():
    progress, file = progress_of(terminal=True)
    with progress.phase("train [3]", total=4, done=1) as advance:
        advance(detail="loss 2.000")
        advance(2, "loss 1.000")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "train [3]" in shown
    assert "4/4" in shown
    assert "loss 1.000" in shown
    assert "ETA" in shown


def test_a_detail_with_brackets_does_not_break_the_bar():
    progress, file = progress_of(terminal=True)
    with progress.phase("train", total=1) as advance:
        advance(detail="[/] loss [nan]")
    assert "[/] loss [nan]" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())


def test_a_notice_is_one_line_however_long():
    progress, file = progress_of(terminal=False)
    progress.notice("word " * 100)
    assert file.getvalue().count("\n") == 1


def test_the_default_console_is_standard_error():
    assert Progress().console.stderr
