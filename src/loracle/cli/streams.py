"""Standard output and error that never end the work: what nobody can take is dropped.

A reader that leaves (``| head``) or a full disk behind standard output must not cost a run that has
hours behind it. The work goes on; afterwards a lost output is told, but for a reader that left.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from loracle.records.files import disk_reason

# The reader of a pipe left, or the terminal was closed: nobody is there to be told.
_LEFT = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET)


class Output:
    """A text stream that drops what cannot be written, and remembers why.

    Other attributes are those of the stream; a closed one (``>&-``) takes nothing.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        """Returns whether it is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def write(self, text: str) -> int:
        """Writes a text; characters that the stream's encoding lacks are escaped."""
        if self.stream is not None and self.error is None:
            with self._remembering():
                try:
                    self.stream.write(text)
                except UnicodeEncodeError as error:
                    self.stream.write(text.encode(error.encoding, "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        """Hands on what was written."""
        if self.stream is not None and self.error is None:
            with self._remembering():
                self.stream.flush()

    @property
    def lost(self) -> str | None:
        """Why output was lost; None if none was, or if its reader left."""
        if self.error is None or self.error.errno in _LEFT:
            return None
        return disk_reason(self.error)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            self._drain()

    def _drain(self) -> None:
        """Lets Python's own flush at exit succeed: the rest of the buffer goes nowhere."""
        assert self.stream is not None
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream.flush()


@contextmanager
def kept_going() -> Iterator[Output]:
    """Replaces both streams inside the block; yields standard output."""
    before = sys.stdout, sys.stderr
    output = Output(sys.stdout)
    sys.stdout, sys.stderr = output, Output(sys.stderr)
    try:
        yield output
    finally:
        output.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def fill_closed_descriptors() -> None:
    """Opens the null device where the caller closed a standard stream.

    Else the next file opened, perhaps a record, would take its number and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
