"""SIGINT, SIGTERM and SIGHUP as a request that the run honours at its next safe point."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from loracle.errors import Interrupted

# SIGHUP: the terminal was closed, or a connection to it lost.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# assumed: no person presses Ctrl-C twice within a second and means it twice
_TOGETHER_S = 1.0


class StopRequest:
    """Notes the first signal; one more, later, ends the process at once, as without us.

    Signals that come together count as one: ``timeout`` and job schedulers signal a process and
    then its group.

    Use as a context manager around a run, and call ``check`` wherever its state is whole.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        # Python only lets the main thread install handlers; elsewhere signals stay the caller's.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # Under ``nohup`` it is ignored, and stays so.
                if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.received is not None:
            raise Interrupted(f"interrupted by {self.received.name}")

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif now - self._received_at > _TOGETHER_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
