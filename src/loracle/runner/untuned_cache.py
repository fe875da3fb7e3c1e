"""Cache of the untuned model's scores and answers, on this machine.

An entry is a file named by a digest over all that its numbers depend on, the source of the code
that computed them included. It is written whole or not at all, so two processes at once do no harm;
one that cannot be trusted is computed again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from loracle.digest import code_digest, digest_of, key_of
from loracle.engine.answers import Answer
from loracle.engine.evaluate import ExampleScore
from loracle.errors import RunFolderError
from loracle.model.identity import BaseIdentity, inputs_of
from loracle.records.files import disk_reason, read_json, write_durably
from loracle.sources.cache import cache_folder

if TYPE_CHECKING:
    from loracle.data.packing import Tokens

_Item = TypeVar("_Item", ExampleScore, Answer)

# Raise when what an entry holds changes.
_SCHEMA = 1
UNTUNED_SOURCES = ("data/**/*.py", "model/**/*.py", "engine/**/*.py")


def untuned_cache_folder() -> Path:
    """Returns the default folder of the cache, inside LoRAcle's."""
    return cache_folder() / "known"


class Untuned(NamedTuple, Generic[_Item]):
    """Scores or answers of the untuned model."""

    items: list[_Item]
    was_cached: bool
    """They were computed in an earlier process."""

    @property
    def origin(self) -> str:
        """How they were obtained, as the section ``engine`` of environment.json states it."""
        return "known" if self.was_cached else "computed"


@dataclass(frozen=True)
class UntunedCache:
    """Scores and answers in a folder, by key."""

    folder: Path
    """Made when first needed."""
    notice: Callable[[str], None] = lambda _: None
    """Takes one line for a person about an entry that is damaged or cannot be written."""

    def scores(self, key: str, compute: Callable[[], list[ExampleScore]]) -> Untuned[ExampleScore]:
        """Returns the scores under ``key``, else computes and stores them.

        Scores that are not finite are returned and not stored.
        """
        return self._obtain(f"{key}-scores", kind=ExampleScore, compute=compute)

    def answers(self, key: str, compute: Callable[[], list[Answer]]) -> Untuned[Answer]:
        """Returns the answers under ``key``, else computes and stores them."""
        return self._obtain(f"{key}-answers", kind=Answer, compute=compute)

    def _obtain(
        self, name: str, *, kind: type[_Item], compute: Callable[[], list[_Item]]
    ) -> Untuned[_Item]:
        path = self.folder / f"{name}.json"
        rows = self._read(path)
        if rows is not None:
            return Untuned([kind(**row) for row in rows], was_cached=True)
        items = compute()
        rows = [asdict(item) for item in items]
        if all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float)):
            self._write(path, rows)
        return Untuned(items, was_cached=False)

    def _read(self, path: Path) -> list[dict[str, Any]] | None:
        """Returns the items of an entry; None if there is none that can be trusted."""
        if not path.exists():
            return None
        try:
            entry = read_json(path)
        except RunFolderError as error:
            self.notice(f"cached results: {error}; computing it again")
            return None
        rows: list[dict[str, Any]] | None = entry.get("items")
        if (entry.get("schema"), entry.get("sha256")) == (_SCHEMA, digest_of(rows)):
            return rows
        self.notice(f"cached results: {path.name} does not have its hash; computing it again")
        return None

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        entry = {"schema": _SCHEMA, "sha256": digest_of(rows), "items": rows}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(entry, allow_nan=False).encode())
        except (OSError, RunFolderError) as error:
            # What was computed is worth more than its copy: the run continues.
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = disk_reason(cause) if isinstance(cause, OSError) else str(error)
            self.notice(
                f"cached results: cannot be stored: {reason}; set LORACLE_CACHE to another folder"
            )


def score_key(
    identity: BaseIdentity,
    examples: Sequence[Tokens],
    *,
    environment: Mapping[str, Any],
    batch_tokens: int,
) -> str:
    """Returns the key of the untuned base's scores of ``examples``, in this order.

    Other ``batch_tokens`` make other rows, which round otherwise in 16 bits.
    """
    ids = [[example.num_prompt, *example.input_ids] for example in examples]
    asked = {"examples": ids, "batch_tokens": batch_tokens}
    return _key("scores", identity, environment=environment, asked=asked)


def answer_key(
    identity: BaseIdentity,
    prompts: Sequence[Sequence[int]],
    *,
    environment: Mapping[str, Any],
    max_new_tokens: int,
    batch_size: int | None,
) -> str:
    """Returns the key of the untuned base's answers to ``prompts``, in this order.

    The settings are those of ``answer_prompts``.
    """
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    asked = {"prompts": [list(prompt) for prompt in prompts], **limits}
    return _key("answers", identity, environment=environment, asked=asked)


def _key(
    kind: str, identity: BaseIdentity, *, environment: Mapping[str, Any], asked: Mapping[str, Any]
) -> str:
    return key_of(
        kind, inputs_of(identity, environment=environment, code=source_digest(), asked=asked)
    )


@cache
def source_digest() -> str:
    """Returns a digest of the code that scores and answers.

    Taken once per process: what runs is what was imported, not what is edited meanwhile.
    """
    return code_digest(UNTUNED_SOURCES)
