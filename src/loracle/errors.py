"""Every error that LoRAcle raises on purpose, and the exit code of each.

::

    LoracleError                  1
    ├── UsageError                2   what a user or a file can put right
    │   ├── ConfigError               unknown key, wrong type, value out of range
    │   │   └── ConfoundError             arms of a study that differ in more than placement
    │   ├── SourceError               missing, gated, unreachable, hash mismatch, unsafe archive
    │   ├── DataError                 rows, columns, encodings, limits
    │   ├── PlacementError            a module or layer that does not exist
    │   ├── ModelError                a model that cannot be adapted or run as asked
    │   └── RunFolderError            finished, in use, unwritable, full disk, another configuration
    ├── RunFailed                 1   a run that started and cannot go on
    │   ├── NonFiniteError            NaN or infinity, with what and where
    │   ├── OutOfMemory               not even the smallest pass fits
    │   └── AuditError                the finished run is not what it claims to be
    └── Interrupted             130   SIGINT or SIGTERM; a checkpoint was written

A message says where, what was given, what is allowed, and the nearest valid choice. ``cli.main``
is the one place that catches them: it prints one line and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoracleError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UsageError(LoracleError):
    """Something the user or one of their files can put right."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that is not valid; all faults are listed at once."""


class ConfoundError(ConfigError):
    """Arms of a study that differ in more than their placement."""


class SourceError(UsageError):
    """A model or data source that cannot be had as asked."""


class DataError(UsageError):
    """Records that cannot be read or used."""


class PlacementError(UsageError):
    """A placement that names a module or layer the model does not have."""


class ModelError(UsageError):
    """A model that cannot be loaded, adapted or run as asked."""


class RunFolderError(UsageError):
    """A run folder that cannot be created, continued or written."""


class RunFailed(LoracleError):
    """A run that started and cannot go on."""


class NonFiniteError(RunFailed):
    """A loss, gradient or weight that is NaN or infinite."""


class OutOfMemory(RunFailed):
    """A run that needs more memory than there is, even in the smallest passes."""


class AuditError(RunFailed):
    """A finished run that fails its own audit."""


class Interrupted(LoracleError):
    """SIGINT or SIGTERM arrived; the checkpoint has been written."""

    exit_code = 130


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the nearest allowed word, or an empty string."""
    nearest = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
