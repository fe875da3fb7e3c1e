"""What a base is: the digests of everything in it that a number can depend on.

They say whether kept values were computed with it, and whether a run that goes on still has the
base that it began with. Where the base lies is no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loracle.digest import Inputs, digest_of
from loracle.errors import ModelError
from loracle.model.adapters import TOKENIZER_PLACES
from loracle.model.base import FrozenBase
from loracle.records.files import read_json

# The parts of an environment that can change a number.
_DEVICE = ("device", "torch_settings", "cuda")
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "bitsandbytes")
# Who wrote a file is in the versions.
_WRITER = ("transformers_version",)
# Options that are described apart, or say where the tokenizer was found, as those in _file do.
_NOT_OPTIONS = (*TOKENIZER_PLACES, "added_tokens_decoder")
_TOKENIZER_STATE = (
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "add_bos_token",
    "add_eos_token", "chat_template", "clean_up_tokenization_spaces", "split_special_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class BaseIdentity:
    """Digests of a base, each 64 hex digits; two bases that agree in them compute alike."""

    weights_sha256: str
    """Of every weight and buffer, as it is used."""
    config_sha256: str
    """Of its configuration, defaults included: sizes, rope, norms, caps, scaling."""
    generation_config_sha256: str
    """Of ``generation_config.json``, which names the ends of its answers."""
    tokenizer_sha256: str
    dtype: str
    """dtype of the weights that were hashed."""
    quantization: str | None
    """How they were packed."""


def identify(base: FrozenBase, *, folder: Path, weights_digest: str) -> BaseIdentity:
    """Returns the identity of a base that was loaded from ``folder``.

    ``weights_digest`` is ``base.weights_digest()``, which costs a second or more to take.

    Raises:
        ModelError: If ``generation_config.json`` is not readable.
    """
    return BaseIdentity(
        weights_sha256=weights_digest,
        config_sha256=digest_of(described_config(base.model.config)),
        generation_config_sha256=digest_of(_generation(folder)),
        tokenizer_sha256=digest_of(described_tokenizer(base.tokenizer)),
        dtype=str(base.dtype).removeprefix("torch."),
        quantization=base.quantization,
    )


def inputs_of(
    identity: BaseIdentity,
    *,
    environment: Mapping[str, Any],
    code: str,
    asked: Mapping[str, Any],
) -> Inputs:
    """Returns the description of what is computed of a base.

    Args:
        identity: The base.
        environment: As ``capture_environment`` returns it.
        code: Digest of the code that computes.
        asked: Token ids, layer and settings.
    """
    return Inputs(
        weights=identity.weights_sha256,
        config=identity.config_sha256,
        generation=identity.generation_config_sha256,
        tokenizer=identity.tokenizer_sha256,
        dtype=identity.dtype,
        quantization=identity.quantization,
        device={part: environment[part] for part in _DEVICE},
        versions={name: environment["versions"].get(name) for name in _PACKAGES},
        code=code,
        asked=asked,
    )


def described_config(config: PreTrainedConfig) -> Any:
    """Returns a model's configuration as plain data, defaults included, without its place."""
    return _without(json.loads(config.to_json_string(use_diff=False)), _WRITER)


def _generation(folder: Path) -> Any:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    origin = f"{folder.name}/{file.name}"
    return _without(read_json(file, origin=origin, fault=ModelError), _WRITER)


def _without(tree: Any, keys: tuple[str, ...]) -> Any:
    """Returns plain data without these keys and those that begin with ``_``, at any depth."""
    if isinstance(tree, list):
        return [_without(item, keys) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: _without(value, keys)
        for key, value in tree.items()
        if not key.startswith("_") and key not in keys
    }


def described_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns all that decides which ids a text has, and which text ids have, as plain data."""
    options = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if name not in _NOT_OPTIONS and not name.endswith("_file")
    }
    added = {str(id_): _plain(token) for id_, token in tokenizer.added_tokens_decoder.items()}
    return {
        "class": type(tokenizer).__name__,
        "rules": _rules(tokenizer),
        "added": added,
        "special": _plain(tokenizer.special_tokens_map),
        "state": {name: _plain(getattr(tokenizer, name, None)) for name in _TOKENIZER_STATE},
        "options": _plain(options),
    }


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Set anew by every call.
        by_call = ("truncation", "padding")
        return {k: v for k, v in json.loads(backend.to_str()).items() if k not in by_call}
    pieces = getattr(tokenizer, "sp_model", None)
    model = pieces.serialized_model_proto().hex() if pieces is not None else None
    return [tokenizer.get_vocab(), model]


def _plain(value: Any) -> Any:
    """Returns a value as plain data, the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, AddedToken):
        return repr(value)
    is_plain = value is None or isinstance(value, str | int | float | bool)
    return value if is_plain else type(value).__name__
