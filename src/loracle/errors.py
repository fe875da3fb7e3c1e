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
    │   │   └── LeakError                 sequences that share a row change each other's loss
    │   └── RunFolderError            finished, in use, unwritable, full disk, another configuration
    ├── RunFailed                 1   a run that started and cannot continue
    │   ├── NonFiniteError            NaN or infinity, with what and where
    │   ├── OutOfMemory               not even the smallest forward pass fits
    │   ├── AuditError                the finished run fails its own check
    │   └── UnexpectedError           an exception that nobody foresaw; its traceback is in a file
    └── Interrupted             130   SIGINT, SIGTERM or SIGHUP; a checkpoint was written

A message states where the fault is, what was given, what is allowed, and the nearest valid choice.
Only ``cli.main`` catches these errors: it prints one line and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
import errno
import re
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


class LeakError(ModelError):
    """A model that mixes the sequences of a packed row."""


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


class UnexpectedError(RunFailed):
    """An exception of a library, or a mistake of ours."""


class Interrupted(LoracleError):
    """SIGINT, SIGTERM or SIGHUP arrived; the checkpoint has been written."""

    exit_code = 130


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the nearest allowed word, or an empty string."""
    nearest = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


# What allocators of the CPU, of a GPU and of the loader say; most have no exception class.
# source: PyTorch's c10 and ATen, oneDNN, cuBLAS, cuDNN, CUDA's driver, glibc, Arrow, as of 2026.
# A handle of cuBLAS or cuDNN that cannot be made lacks the memory of its workspace.
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|could not create a (primitive|memory)|"
    r"out[ _]of[ _]memory|not enough memory|std::bad_alloc|unable to mmap|_ALLOC_FAILED|"
    r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_NOT_INITIALIZED|cudaErrorMemoryAllocation|"
    r"unable to find an engine to execute|failed to map segment|malloc of size|realloc of size",
    re.IGNORECASE,
)


def means_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says, in its own way, that there was no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # A class of its own, an import that could not be mapped, or a plain RuntimeError.
    kinds = (RuntimeError, OSError, ImportError, SystemError)
    return isinstance(error, kinds) and _NO_MEMORY.search(str(error)) is not None


# assumed: enough to know an error by; the rest is in its traceback
_LONGEST = 400


def in_one_line(error: BaseException) -> str:
    """Returns class and text of an exception, without line breaks, and not longer than a screen."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
