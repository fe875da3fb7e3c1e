"""A command ends in one line whatever happens, and its output never ends the work."""

import errno
import io
import subprocess
import sys

import pytest

from loracle.cli.ending import run
from loracle.cli.streams import Output
from loracle.errors import RunFailed


class Broken(io.StringIO):
    """A stream behind which there is no room, no reader, or an encoding without the letter."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def raising(error):
    def command(*, standalone_mode):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("a"), "UnexpectedError: KeyError: 'a' (loracle --debug ... shows where)"),
        (RecursionError("deep"), "UnexpectedError: RecursionError: deep "),
        (MemoryError(), "OutOfMemory: MemoryError "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "OutOfMemory: OSError: [Errno 12]"),
        (RunFailed("[bold]no[/]"), "RunFailed: [bold]no[/]"),
        (ValueError("two\nlines"), "UnexpectedError: ValueError: two lines "),
    ],
)
def test_any_exception_is_one_line_and_exit_code_1(capsys, error, line):
    assert run(raising(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_only_debug_shows_a_traceback(place):
    quiet = place.loracle("report", "nowhere")
    told = place.loracle("--debug", "report", "nowhere")
    assert quiet.code == told.code == 2
    assert told.err.startswith("Traceback (most recent call last):")
    assert told.err.endswith(quiet.err)
    assert place.loracle("report", "nowhere").err == quiet.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space"), 1, "OutputLost: standard output: the disk is full;"),
        (OSError(errno.EIO, "I/O error"), 0, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0, ""),
    ],
)
def test_work_whose_output_is_lost_goes_on(monkeypatch, capsys, error, code, said):
    done = []

    def command(*, standalone_mode):
        for part in range(3):
            sys.stdout.write(f"part {part}")
            sys.stdout.flush()
            done.append(part)

    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert run(command) == code
    assert done == [0, 1, 2]
    assert capsys.readouterr().err.startswith(said)


def test_an_error_keeps_its_code_when_standard_error_is_lost(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(OSError(errno.ENOSPC, "No space")))
    assert run(raising(RunFailed("no"))) == 1


def test_a_letter_that_the_encoding_lacks_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    output = Output(stream)
    output.write("caf\u00e9 \ud800 \u2192\n")
    output.flush()
    assert raw.getvalue() == rb"caf\xe9 \ud800 \u2192" + b"\n"


def test_without_streams_nothing_is_printed_and_nothing_raised():
    nothing = Output(None)
    assert nothing.write("x") == 1
    nothing.flush()
    assert not nothing.isatty()
    assert nothing.lost is None


SHELL = "{python} -m loracle config {redirection}"


@pytest.mark.parametrize(
    ("redirection", "code"), [(">/dev/full", 1), ("2>/dev/full", 0), (">&- 2>&- <&-", 0)]
)
def test_a_real_command_without_a_place_for_its_output(redirection, code):
    command = SHELL.format(python=sys.executable, redirection=redirection)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.count("\n") == (1 if redirection == ">/dev/full" else 0)


def test_a_closed_standard_stream_never_takes_a_record(tmp_path):
    """The first file opened gets the free number, and with it what libraries print."""
    code = (
        "from loracle.cli.streams import fill_closed_descriptors as fill\n"
        "fill()\n"
        f"file = open({str(tmp_path / 'record')!r}, 'w')\n"
        "assert file.fileno() > 2, file.fileno()\n"
    )
    command = f"{sys.executable} - >&- 2>&-"
    done = subprocess.run(command, shell=True, input=code, text=True, check=False)
    assert done.returncode == 0
