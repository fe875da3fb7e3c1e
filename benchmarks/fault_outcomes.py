"""How a trial of the fault campaign comes out, and how that is judged.

After a fault the command is started again without one: it must come to the same bits as if nothing
had happened, or say in one line what is wrong, by name, so that what was sound can be put back and
the run goes on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_ground import Ended, Ground

OUTCOMES = ("survived", "refused", "lost", "silent")
"""Survived: the same bits. Refused: one line names the fault, nothing is lost. Lost: a traceback,
a hang, or a restart that comes to nothing. Silent: other figures without a word."""

Trial = Callable[[Ground, random.Random, Path], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a trial came out."""

    kind: str
    what: str
    """The fault as it was drawn, and what was seen if it came out badly."""


def one_line(ended: Ended) -> bool:
    """Returns whether a command ended with one clear line and without a traceback."""
    lines = ended.err.strip().splitlines()
    is_clear = bool(lines) and re.match(r"^\w+: \S", lines[-1]) is not None
    return ended.code in ("1", "2", "130") and is_clear and not traceback_in(ended)


def traceback_in(ended: Ended) -> bool:
    """Returns whether a terminal saw a traceback or an abort."""
    seen = ended.err + ended.out
    return "Traceback (most recent" in seen or "panicked at" in seen or "Fatal" in seen


def lost(what: str, ended: Ended) -> Outcome:
    """Returns the outcome of a command that ended badly, with the end of what it said."""
    return Outcome("lost", f"{what}: {ended.code}: {ended.err[-300:]}")


def judged(ground: Ground, run: Path, first: Ended, what: str) -> Outcome:
    """Starts the run again, unless it is done, and compares what it comes to."""
    if traceback_in(first) or first.code == "hang":
        return lost(what, first)
    if first.code == "0":
        return _same(ground, run, what)
    again = ground.again(run)
    if again.code != "0":
        return Outcome("lost", f"{what}: {first.code}, then {again.code}: {again.err[-300:]}")
    return _same(ground, run, what)


def _same(ground: Ground, run: Path, what: str) -> Outcome:
    """Returns whether a run that completed has the bits of the undisturbed one."""
    try:
        is_same = ground.facts(run) == ground.expected
    except (OSError, ValueError, KeyError) as error:
        return Outcome("silent", f"{what}: completed, but {error!r}")
    return Outcome("survived" if is_same else "silent", what)
