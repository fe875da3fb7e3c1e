"""The content of ``data.json``, and the fingerprint that is equal for runs on the same data."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from loracle.data.records import Record
from loracle.data.split import Split, normalized
from loracle.data.tokens import Example

_QUANTILES = {"min": 0, "p10": 10, "p25": 25, "p50": 50, "p75": 75, "p90": 90, "p95": 95,
              "p99": 99, "max": 100}  # fmt: skip


def fingerprint(train: Sequence[Example], *, validation: Sequence[Example]) -> str:
    """Returns 16 hex digits, equal if and only if a model sees the same tokens in the same split.

    Hashed over each part's ids and prompt counts, in order. Not over row numbers, file names or
    formats: the same records read from CSV and from Parquet are the same data.
    """
    digest = hashlib.sha256()
    for part in (train, validation):
        digest.update(len(part).to_bytes(8, "little"))
        for example in part:
            header = (example.num_prompt, example.num_tokens)
            digest.update(np.asarray((*header, *example.input_ids), dtype="<i4").tobytes())
    return digest.hexdigest()[:16]


def describe_part(examples: Sequence[Example]) -> dict[str, Any]:
    """Returns counts of one part and the quantiles of its token lengths; it must not be empty."""
    lengths = {
        "prompt": [example.num_prompt for example in examples],
        "response": [example.num_targets for example in examples],
        "total": [example.num_tokens for example in examples],
    }
    points = list(_QUANTILES.values())
    return {
        "num_examples": len(examples),
        "num_tokens": sum(lengths["total"]),
        "num_targets": sum(lengths["response"]),
        "num_truncated": sum(example.truncated for example in examples),
        "tokens_per_example": {
            name: dict(zip(_QUANTILES, np.percentile(values, points).tolist(), strict=True))
            | {"mean": float(np.mean(values))}
            for name, values in lengths.items()
        },
    }


def describe_recurring(records: Sequence[Record]) -> dict[str, int]:
    """Returns how many instructions occur more than once, and in how many records."""
    counts = Counter(normalized(record.instruction) for record in records)
    return _recurring(counts.values())


def describe_repeated(split: Split) -> dict[str, int]:
    """Returns how many groups of records ask the same, and how many records are in them."""
    return _recurring(split.group_sizes)


def _recurring(counts: Iterable[int]) -> dict[str, int]:
    sizes = [count for count in counts if count > 1]
    return {"num_groups": len(sizes), "num_records": sum(sizes)}


def public_source(source: str) -> str:
    """Returns ``source`` without the folders of an absolute path: they name a machine."""
    scheme, colon, path = source.partition(":")
    private = colon and scheme == "path" and (path.startswith("~") or PurePath(path).is_absolute())
    return f"path:{PurePath(path).name}" if private else source
