"""Exceptions that nobody foresaw, as the failure of the run that they ended.

The run's folder gets one line in ``status.json`` and the traceback in ``traceback.txt``; neither
tells where on the machine anything lies.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from loracle.errors import (
    LoracleError,
    OutOfMemory,
    RunFailed,
    RunFolderError,
    UnexpectedError,
    in_one_line,
)
from loracle.model.faults import is_out_of_memory
from loracle.records.files import disk_reason
from loracle.records.names import TRACEBACK
from loracle.records.run_folder import RunFolder

_SMALLER = "`loracle plan` says what fits"


def as_failure(error: Exception, folder: RunFolder) -> LoracleError:
    """Returns the failure of a run that an exception means, with its traceback in the folder.

    Errors raised on purpose are returned as they are, and leave no traceback.
    """
    if isinstance(error, LoracleError):
        return error
    kept = _keep_traceback(error, folder)
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory ({in_one_line(error)}); {_SMALLER}{kept}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailed(f"{disk_reason(error)}; free some space and resume{kept}")
    return UnexpectedError(f"{without_places(in_one_line(error))}{kept}")


def record_failure(folder: RunFolder, error: LoracleError) -> None:
    """Leaves the reason of a failed run in its folder, without the folder's path."""
    reason = str(error).replace(str(folder.path), folder.path.name)
    # A full disk cannot hold this either.
    with suppress(RunFolderError):
        folder.set_status("failed", error=reason)


def without_places(text: str) -> str:
    """Returns a text with files named from where they are imported, and the home as ``~``."""
    roots = {path for path in (*sys.path, sys.prefix, _here()) if len(path) > 1}
    for root in sorted(roots, key=len, reverse=True):
        text = text.replace(f"{root}/", "")
    home = os.environ.get("HOME", "")
    return text.replace(home, "~") if len(Path(home).parts) > 1 else text


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        # The folder was removed meanwhile.
        return ""


def _keep_traceback(error: Exception, folder: RunFolder) -> str:
    """Writes the traceback; returns where it is, in brackets, or nothing if that failed too."""
    try:
        text = without_places("".join(traceback.format_exception(error)))
        folder.write_text(TRACEBACK, text.encode("utf-8", "backslashreplace").decode())
    except (LoracleError, OSError, MemoryError, RecursionError):
        return ""
    return f" (traceback in {folder.path / TRACEBACK})"
