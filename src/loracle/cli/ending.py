"""How a command ends: its exit code, an error as one line, output that did not arrive."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer
from rich.text import Text

from loracle.cli.streams import Output, kept_going
from loracle.errors import LoracleError, in_one_line, means_out_of_memory
from loracle.screen import screen
from loracle.text import inert, one_line

# Whether tracebacks are shown; set by ``--debug`` at each start of the command.
_debugging = False


def show_tracebacks(wanted: bool) -> None:
    """Sets whether an error's traceback is shown before its line."""
    global _debugging  # noqa: PLW0603 - the error is told after the command line is gone
    _debugging = wanted


def run(command: Callable[..., Any]) -> int:
    """Runs a command and returns its exit code; prints any error as one line.

    Output that could not be written is an error too, unless its reader left.
    """
    with kept_going() as output:
        code = _code_of(command)
        output.flush()
        return _code_with(output, code=code)


def _code_of(command: Callable[..., Any]) -> int:
    try:
        code = command(standalone_mode=False)
    except LoracleError as error:
        _tell(type(error).__name__, str(error))
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:  # noqa: BLE001 - the one catch of the command line
        return _code_of_exception(error)
    return code if isinstance(code, int) else 0


def _code_of_exception(error: Exception) -> int:
    """Prints an exception that is not ours as one line, and returns its exit code."""
    show = getattr(error, "show", None)
    if show is not None:
        if isinstance(getattr(error, "message", None), str):
            error.message = inert(error.message)  # type: ignore[attr-defined]
        show()
        return int(getattr(error, "exit_code", 2))
    kind = "OutOfMemory" if means_out_of_memory(error) else "UnexpectedError"
    _tell(kind, f"{in_one_line(error)} (loracle --debug ... shows where)")
    return 1


def _code_with(output: Output, *, code: int) -> int:
    """Returns the exit code, which also says whether the output arrived."""
    if output.lost is None:
        return code
    _tell("OutputLost", f"standard output: {output.lost}; what was to be printed is lost")
    return code or 1


def _tell(kind: str, text: str) -> None:
    """Prints an error as one line; with ``--debug`` after its traceback."""
    if _debugging and sys.exc_info()[0] is not None:
        traceback.print_exc()
    message = Text.assemble((kind, "bold red"), f": {one_line(text)}")
    screen(stderr=True, soft_wrap=True).print(message)
