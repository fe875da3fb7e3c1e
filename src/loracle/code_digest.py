"""A digest of source files, so that results kept by edited code are never taken for new ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def code_digest(root: Path, patterns: Sequence[str]) -> str:
    """Returns a SHA-256 in hex over the names and contents of the files that match.

    Args:
        root: Folder; names count from here, so a copy elsewhere has the same digest.
        patterns: Globs below it, in the order in which they count.
    """
    digest = hashlib.sha256()
    for path in (path for pattern in patterns for path in sorted(root.glob(pattern))):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
