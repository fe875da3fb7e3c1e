"""A digest of source files, so that results cached by older code are not reused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent


def code_digest(patterns: Sequence[str], *, package: Path = PACKAGE) -> str:
    """Returns a SHA-256 in hex over the names and contents of the files that match.

    Args:
        patterns: Globs below the package; their order changes the digest.
        package: Folder to which file names are relative, so a copy elsewhere has the same digest.

    Raises:
        FileNotFoundError: If a pattern matches no file, as after a move: a digest that omits code
            would keep outdated results.
    """
    digest = hashlib.sha256()
    for pattern in patterns:
        paths = sorted(package.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"{package.name}/{pattern}: no source file matches")
        for path in paths:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()
