"""Every error that LoRAcle raises on purpose, with its exit code.

::

    LoracleError                  1
    ├── UsageError                2   the user or a file can correct it
    │   ├── ConfigError               unknown key, wrong type, value out of range
    │   │   └── ConfoundError             arms of a study that differ in more than placement
    │   ├── SourceError               missing, gated, unreachable, hash mismatch, unsafe archive
    │   ├── DataError                 rows, columns, encodings, limits
    │   ├── PlacementError            a module or layer that does not exist
    │   ├── ModelError                a model that cannot be adapted or run as requested
    │   └── RunFolderError            finished, in use, unwritable, full disk, another configuration
    ├── RunFailed                 1   a run that started and cannot continue
    │   ├── NonFiniteError            NaN or infinity, with what and where
    │   ├── OutOfMemory               not even the smallest forward pass fits
    │   └── AuditError                the finished run fails its own check
    └── Interrupted             130   SIGINT or SIGTERM; a checkpoint was written

A message states where the fault is, what was given, what is allowed, and the nearest valid choice.
Only ``cli.main`` catches these errors: it prints one line and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoracleError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UsageError(LoracleError):
    """A fault that the user can correct, in a command or a file."""

    exit_code = 2


class ConfigError(UsageError):
    """An invalid configuration; the message lists all faults."""


class ConfoundError(ConfigError):
    """Arms of a study that differ in more than their placement."""


class SourceError(UsageError):
    """A model or data source that is invalid or cannot be obtained."""


class DataError(UsageError):
    """Records that cannot be read or used."""


class PlacementError(UsageError):
    """A placement that names a module or layer the model does not have."""


class ModelError(UsageError):
    """A model that cannot be loaded, adapted or run as requested."""


class RunFolderError(UsageError):
    """A run folder that cannot be created, continued or written."""


class RunFailed(LoracleError):
    """A run that started and cannot continue."""


class NonFiniteError(RunFailed):
    """A loss, gradient or weight that is NaN or infinite."""


class OutOfMemory(RunFailed):
    """A run that does not fit in memory even with the smallest passes."""


class AuditError(RunFailed):
    """A finished run that fails its own audit."""


class Interrupted(LoracleError):
    """SIGINT or SIGTERM arrived; the checkpoint has been written."""

    exit_code = 130


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the nearest allowed word, or an empty string."""
    nearest = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
