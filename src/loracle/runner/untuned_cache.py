"""Cache of the untuned model's scores and answers, on this machine.

An entry is a file named by a digest over all that its numbers depend on, the source of the code
that computed them included. It is written whole or not at all, so two processes at once do no harm;
one that cannot be trusted is computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from loracle.digest import code_digest
from loracle.engine.device import dtype_name
from loracle.engine.environment import capture_environment
from loracle.engine.evaluate import Answer, ExampleScore
from loracle.errors import RunFolderError
from loracle.records.files import disk_reason, read_json, write_durably
from loracle.sources.cache import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loracle.data.packing import Tokens
    from loracle.model.base import FrozenBase

_Item = TypeVar("_Item", ExampleScore, Answer)

# Raise when what an entry holds changes.
_SCHEMA = 1
# The parts of an environment that can change a number (environment.capture_environment).
_ENVIRONMENT = ("device", "torch_settings", "cuda")
_PACKAGES = ("torch", "transformers", "peft", "tokenizers")
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
        if (entry.get("schema"), entry.get("sha256")) == (_SCHEMA, _digest(rows)):
            return rows
        self.notice(f"cached results: {path.name} does not have its hash; computing it again")
        return None

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        entry = {"schema": _SCHEMA, "sha256": _digest(rows), "items": rows}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(entry, allow_nan=False).encode())
        except (OSError, RunFolderError) as error:
            # What was computed is worth more than its copy: the run continues.
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = disk_reason(cause) if isinstance(cause, OSError) else str(error)
            self.notice(
                f"cached results: cannot be stored: {reason}; LORACLE_CACHE names another folder"
            )


def score_key(
    base: FrozenBase, examples: Sequence[Tokens], *, weights_digest: str, batch_tokens: int
) -> str:
    """Returns the key of the untuned base's scores of ``examples``, in this order.

    ``weights_digest`` is ``base.weights_digest()``, which costs a second or more to take; other
    ``batch_tokens`` make other rows, which round otherwise in 16 bits.
    """
    return _digest(
        {
            **_origin(base, weights_digest=weights_digest),
            "examples": [[example.num_prompt, *example.input_ids] for example in examples],
            "batch_tokens": batch_tokens,
        }
    )


def answer_key(
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    weights_digest: str,
    max_new_tokens: int,
    batch_size: int | None,
) -> str:
    """Returns the key of the untuned base's answers to ``prompts``, in this order.

    The settings are those of ``answer_prompts``; the tokenizer turns answers into text.
    """
    return _digest(
        {
            **_origin(base, weights_digest=weights_digest),
            "prompts": [list(prompt) for prompt in prompts],
            "tokenizer": _tokenizer_digest(base.tokenizer),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        }
    )


def _origin(base: FrozenBase, *, weights_digest: str) -> dict[str, Any]:
    environment = capture_environment(
        device=str(base.device), dtype=dtype_name(base.dtype), quantization=base.quantization
    )
    return {
        "weights": weights_digest,
        "code": source_digest(),
        "versions": {name: environment["versions"][name] for name in _PACKAGES},
        **{part: environment[part] for part in _ENVIRONMENT},
    }


@cache
def source_digest() -> str:
    """Returns a digest of the code that scores and answers.

    Taken once per process: what runs is what was imported, not what is edited meanwhile.
    """
    return code_digest(UNTUNED_SOURCES)


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return _digest([type(tokenizer).__name__, tokenizer.eos_token_id, rules])


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
