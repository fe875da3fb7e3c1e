"""The lock of a run's folder: one process at a time, released by the kernel if it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loracle.errors import RunFolderError
from loracle.records.files import disk_faults, is_unsupported
from loracle.records.names import LOCK


@contextmanager
def acquired(path: Path) -> Iterator[int]:
    """Yields the descriptor that holds the folder's lock; closed, and so released, on an error.

    Raises:
        RunFolderError: If another process holds it, or the folder cannot be written.
    """
    with disk_faults(path):
        descriptor = _acquire(path)
    try:
        yield descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _acquire(path: Path) -> int:
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunFolderError(
            f"{path}: in use by another process; wait, or give another --out"
        ) from None
    except OSError as error:
        # A file system without locks is still usable.
        if not is_unsupported(error):
            os.close(descriptor)
            raise
    return descriptor
