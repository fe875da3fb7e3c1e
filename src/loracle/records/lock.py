"""The lock of a run's folder: one process at a time, released by the kernel if it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from loracle.errors import RunFolderError
from loracle.records.files import is_unsupported
from loracle.records.names import LOCK


def acquire(path: Path) -> int:
    """Returns the descriptor that holds the folder's lock; closing it releases the lock."""
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
