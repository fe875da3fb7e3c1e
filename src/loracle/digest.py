"""The one key of every kept value, and digests of data and of source files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a kept value can be computed from; None where it cannot depend on that.

    No field has a default, so that whoever keeps a new kind of value decides about each. None of
    them holds a place: a folder that is moved keeps its keys.
    """

    weights: str | None
    """Digest of the weights as they are used, or of the file that they are made from."""
    config: str | None
    """Digest of the model's whole configuration."""
    generation: str | None
    """Digest of the model's settings for generation."""
    tokenizer: str | None
    """Digest of the tokenizer: rules, special and added tokens, chat template."""
    dtype: str | None
    """dtype of weights and products."""
    quantization: str | None
    """How the weights are packed."""
    device: Mapping[str, Any] | None
    """Name of the device, and the settings that change what it computes."""
    versions: Mapping[str, str | None]
    """Versions of the libraries that compute it."""
    code: str | None
    """``code_digest`` of our code that computes it."""
    asked: Mapping[str, Any]
    """What is computed of them: token ids (which carry the template), layer, limits."""


def key_of(kind: str, inputs: Inputs) -> str:
    """Returns 64 hex digits under which a value of this kind is kept; other inputs, another key."""
    described = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return digest_of({"kind": kind, **described})


def digest_of(data: Any) -> str:
    """Returns a SHA-256 in hex of plain data; the order of the keys of an object is nothing."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


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
