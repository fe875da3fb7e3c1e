"""Scores and answers that were computed before, on this machine, from exactly the same things.

An entry is a file named by a digest over all that its numbers depend on, the source of the code
that computed them included. It is written whole or not at all, so two processes at once do no harm;
one that cannot be trusted is computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loracle.digest import code_digest
from loracle.engine.decode import CACHE_TOKENS
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


def known_folder() -> Path:
    """Returns where results are kept by default: inside LoRAcle's cache."""
    return cache_folder() / "known"


@dataclass(frozen=True)
class Known:
    """Results in a folder, by key."""

    folder: Path
    """Made when first needed."""
    notice: Callable[[str], None] = lambda _: None
    """Takes one line for the screen where an entry is damaged or cannot be kept."""

    def scores(
        self, key: str, compute: Callable[[], list[ExampleScore]]
    ) -> tuple[list[ExampleScore], bool]:
        """Returns the scores under ``key`` and whether they were known; else computes and keeps.

        Scores that are not finite are returned and not kept.
        """
        return self._obtain(f"{key}-scores", kind=ExampleScore, compute=compute)

    def answers(self, key: str, compute: Callable[[], list[Answer]]) -> tuple[list[Answer], bool]:
        """Returns the answers under ``key`` and whether they were known, like ``scores``."""
        return self._obtain(f"{key}-answers", kind=Answer, compute=compute)

    def _obtain(
        self, name: str, *, kind: type[_Item], compute: Callable[[], list[_Item]]
    ) -> tuple[list[_Item], bool]:
        path = self.folder / f"{name}.json"
        rows = self._read(path)
        if rows is not None:
            return [kind(**row) for row in rows], True
        found = compute()
        if all(math.isfinite(value) for item in found for value in _numbers(item)):
            self._write(path, [asdict(item) for item in found])
        return found, False

    def _read(self, path: Path) -> list[dict[str, Any]] | None:
        """Returns the items of an entry; None if there is none that can be trusted."""
        if not path.exists():
            return None
        try:
            entry = read_json(path)
        except RunFolderError as error:
            self.notice(f"known results: {error}; computing it again")
            return None
        rows: list[dict[str, Any]] | None = entry.get("items")
        if (entry.get("schema"), entry.get("sha256")) == (_SCHEMA, _digest(rows)):
            return rows
        self.notice(f"known results: {path.name} does not have its hash; computing it again")
        return None

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        entry = {"schema": _SCHEMA, "sha256": _digest(rows), "items": rows}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(entry, allow_nan=False).encode())
        except (OSError, RunFolderError) as error:
            # What was computed is worth more than its copy: the run goes on.
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = disk_reason(cause) if isinstance(cause, OSError) else str(error)
            self.notice(
                f"known results: cannot be kept: {reason}; LORACLE_CACHE names another folder"
            )


def score_key(
    base: FrozenBase,
    examples: Sequence[Tokens],
    *,
    weights_digest: str,
    adapter: str | None,
    batch_tokens: int,
    num_adapters: int = 1,
    entry_layer: int = 0,
) -> str:
    """Returns the key of the scores of ``examples``.

    Args:
        base: The frozen model.
        examples: What is scored, in order.
        weights_digest: ``base.weights_digest()``, which costs a second or more to take.
        adapter: Digest of the adapter file; None: the untuned base.
        batch_tokens: As given to ``score_adapters``; other rows round otherwise in 16 bits.
        num_adapters: Adapters in the pass.
        entry_layer: Layer whose kept states were used; 0: none.
    """
    return _digest(
        {
            **_origin(base, weights_digest=weights_digest, adapter=adapter),
            "examples": [[example.num_prompt, *example.input_ids] for example in examples],
            "batch_tokens": batch_tokens,
            "num_adapters": num_adapters,
            "entry_layer": entry_layer,
        }
    )


def answer_key(
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    weights_digest: str,
    adapter: str | None,
    max_new_tokens: int,
    batch_size: int | None,
    cache_tokens: int = CACHE_TOKENS,
    num_adapters: int = 1,
) -> str:
    """Returns the key of the answers to ``prompts``.

    Args:
        base: The frozen model, and the tokenizer that turns answers into text.
        prompts: Token ids of each prompt, in order.
        weights_digest: ``base.weights_digest()``, which costs a second or more to take.
        adapter: Digest of the adapter file; None: the untuned base.
        max_new_tokens: As given to ``answer_with_adapters``, like all that follows.
        batch_size: Prompts decoded together, at most.
        cache_tokens: Positions of the cache.
        num_adapters: Adapters in the batch.
    """
    return _digest(
        {
            **_origin(base, weights_digest=weights_digest, adapter=adapter),
            "prompts": [list(prompt) for prompt in prompts],
            "tokenizer": _tokenizer_digest(base.tokenizer),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "cache_tokens": cache_tokens,
            "num_adapters": num_adapters,
        }
    )


def _origin(base: FrozenBase, *, weights_digest: str, adapter: str | None) -> dict[str, Any]:
    environment = capture_environment(
        device=str(base.device), dtype=dtype_name(base.dtype), quantization=base.quantization
    )
    return {
        "weights": weights_digest,
        "adapter": adapter or "base",
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


def _numbers(item: ExampleScore | Answer) -> Iterator[float]:
    return (value for value in asdict(item).values() if isinstance(value, float))


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
