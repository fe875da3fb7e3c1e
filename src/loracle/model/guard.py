"""Compares a base with stock Transformers, and a row with another, before the base is used.

A model with a recurrent state, a window that only its mask knows, or an attention of its own would
silently mix the sequences of a row. Comparing numbers needs no list of architectures. A tiny model
of the same configuration decides first, in fp32 and without any weights; then the base itself.

Shapes: N targets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

from loracle.data.packing import pack
from loracle.digest import Inputs, code_digest, digest_of, key_of
from loracle.errors import LeakError, ModelError, RunFolderError, SourceError
from loracle.model.base import PROBES, FrozenBase, Probe, cross_entropy
from loracle.model.faults import model_faults
from loracle.model.identity import described_config
from loracle.model.inventory import transformers_config
from loracle.model.miniature import ROW, SEQUENCE, miniatures, names_length
from loracle.records.files import read_json, write_json
from loracle.screen import quiet_transformers
from loracle.sources.cache import cache_folder
from loracle.version import package_version

# assumed: a larger difference between the fast head and the model's own is more than rounding
_HEAD_TOLERANCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# The largest of a token in fp32, the mean in 16 bits, where other shapes round otherwise.
# measured (SmolLM2-135M, CPU, random tokens): 0 in fp32, a mean of 0.07 in bf16
_STOCK_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
# measured (tiny models of 37 types, CPU): at most 5e-7 if sound, at least 7e-3 if sequences leak.
# measured (miniatures of 110 default configurations, fp32, CPU, 2026-11-30): at most 4.8e-6 of 77
# sound ones (0 without experts), at least 0.16 of 22 that leak.
# Rows of one shape give the same bits in 16 bits too, except where experts share a product with
# other tokens and round otherwise (assumed).
_LEAK_NATS = 1e-4
_LEAK_OF_EXPERTS_NATS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Tokens of two sequences that take turns at the start of a row, and of the one after them.
_LENGTHS = (24, 24, 17)
# The same on a miniature, whose row exceeds the lengths of its configuration.
_MINIATURE_LENGTHS = (ROW - SEQUENCE, ROW - SEQUENCE, SEQUENCE)

_SCHEMA = 1
MINIATURE_SOURCES = ("model/*.py", "model/layers/*.py", "data/packing.py")
# Decisions that this process has already made or read, by key.
_decided: dict[str, str | None] = {}


def require_sealed_architecture(architecture: Mapping[str, Any]) -> None:
    """Checks, before anything is fetched, that an architecture keeps sequences of a row apart.

    Nothing is decided about a configuration that Transformers cannot read without remote code.

    Raises:
        LeakError: If a tiny model of it does not.
    """
    try:
        with model_faults("config.json"), quiet_transformers():
            config = transformers_config(architecture)
    except ModelError:
        return
    require_sealed_rows(config)


def require_sealed_rows(config: PreTrainedConfig, *, tokens: int | None = None) -> None:
    """Checks in fp32, on a tiny model of a configuration, that sequences of a row are kept apart.

    Where no tiny model can be built and run, nothing is decided. What is decided is kept.

    Args:
        config: The model's own.
        tokens: Of the longest sequence that is to be used; None: not known.

    Raises:
        LeakError: If they are not.
    """
    key = _decision_key(config, tokens=tokens)
    if key not in _decided:
        _decided[key] = _kept(key, config, tokens=tokens)
    leak = _decided[key]
    if leak is not None:
        raise LeakError(leak)


def _kept(key: str, config: PreTrainedConfig, *, tokens: int | None) -> str | None:
    """Returns the decision that is kept under a key, else makes and keeps it."""
    try:
        folder = cache_folder() / "sealed"
        entry = _read(folder / f"{key}.json")
    except SourceError:
        return _leak(config, tokens=tokens)
    if entry is not None:
        leak: str | None = entry["leak"]
        return leak
    leak = _leak(config, tokens=tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{key}.json", _entry(leak))
    except (OSError, RunFolderError):
        pass  # it is decided again next time
    return leak


def _entry(leak: str | None) -> dict[str, Any]:
    return {"schema": _SCHEMA, "sha256": digest_of(leak), "leak": leak}


def _read(path: Path) -> dict[str, Any] | None:
    """Returns a kept decision; None if there is none that can be trusted."""
    try:
        entry = read_json(path)
    except RunFolderError:
        return None
    return entry if entry == _entry(entry.get("leak")) else None


def _leak(config: PreTrainedConfig, *, tokens: int | None) -> str | None:
    """Returns how a miniature mixes the sequences of a row; None if it does not or cannot run."""
    for base in miniatures(config, tokens=tokens):
        try:
            with quiet_transformers():
                _require_as_stock(base, lengths=_MINIATURE_LENGTHS)
        except LeakError as leak:
            return str(leak)
        except ModelError as error:
            if error.__cause__ is None:  # what we refuse ourselves, no size changes
                return None
            continue
        return None
    return None


def _decision_key(config: PreTrainedConfig, *, tokens: int | None) -> str:
    described = described_config(config)
    others = ("dtype", "quantization_config", "architectures")
    inputs = Inputs(
        weights=None,
        config=digest_of({key: described[key] for key in described if key not in others}),
        generation=None,
        tokenizer=None,
        dtype="float32",
        quantization=None,
        device=None,
        versions={name: package_version(name) for name in ("torch", "transformers")},
        code=_source_digest(),
        asked={"tokens": tokens},
    )
    return key_of("sealed rows", inputs)


@lru_cache(maxsize=1)
def _source_digest() -> str:
    return code_digest(MINIATURE_SOURCES)


def checked(base: FrozenBase) -> FrozenBase:
    """Returns the base with ``plain_head`` set, after trying it on packed rows.

    In 16 bits its own losses cannot show every leak, so a tiny model decides in fp32 before.

    Raises:
        ModelError: If sequences of a row change each other's loss, or a row gives another loss than
            stock Transformers gives each of its sequences.
    """
    if base.dtype != torch.float32:
        require_sealed_rows(base.model.config)
    _require_as_stock(base, lengths=_LENGTHS)
    return replace(base, plain_head=_has_plain_head(base))


def require_long_rows(base: FrozenBase, *, tokens: int) -> None:
    """Checks sequences of ``tokens`` where the configuration names a length that they exceed.

    Windows, chunks and local attention begin to matter there, and some are known to a mask only,
    which packed rows do not have.

    Raises:
        ModelError: As `checked`.
    """
    config = base.model.config.get_text_config().to_dict()
    named = [value for key, value in config.items() if names_length(key)]
    if any(type(value) is int and 1 < value < tokens for value in named):
        first, _, _ = _LENGTHS
        if base.dtype != torch.float32:
            require_sealed_rows(base.model.config, tokens=tokens)
        _require_as_stock(base, lengths=(first, first, tokens))


def _require_as_stock(base: FrozenBase, *, lengths: tuple[int, int, int]) -> None:
    """Checks a row of the second and third of three sequences of these lengths.

    The first two are of one length and take turns before the third.
    """
    name = type(base.model).__name__
    ids = probe_ids(base, count=sum(lengths))
    stop, start, _ = accumulate(lengths)
    other, first, second = Probe(ids[:stop]), Probe(ids[stop:start]), Probe(ids[start:])
    with model_faults(f"{name}: cannot run on packed rows"), torch.inference_mode():
        row = pack((first, second), device=base.device)
        packed = base.nll_from_logits(row)
        beside_other = base.nll_from_logits(pack((other, second), device=base.device))
        alone = torch.cat([stock_nll(base, probe) for probe in (first, second)])
    if not torch.isfinite(alone).all():
        raise ModelError(f"{name}: the untuned model gives NaN or infinity")
    targets = row.num_targets[0]
    _require_sealed(packed[targets:], beside_other[targets:], base=base)
    _require_stock(packed, alone, base=base)


def probe_ids(base: FrozenBase, *, count: int) -> tuple[int, ...]:
    """Returns ids of tokens that a text can have, drawn from the whole vocabulary."""
    config = base.model.config.to_dict()
    fields = [*config.items()]
    fields += [item for part in config.values() if isinstance(part, dict) for item in part.items()]
    special = {str(value) for key, value in fields if re.search("token_(id|index)$", str(key))}
    special |= {str(id_) for id_ in base.tokenizer.all_special_ids}
    rows = base.model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = [i for i in torch.randperm(rows, generator=draw).tolist() if str(i) not in special]
    return tuple((ids * -(-count // len(ids)))[:count])


def _require_sealed(packed: Tensor, beside_other: Tensor, *, base: FrozenBase) -> None:
    """Raises if a sequence's loss depends on what stands before it in the row.

    Both rows have the same shape, so a sound model gives the same numbers in 16 bits too.
    """
    leak = (packed - beside_other).abs().max().item()
    experts = any("expert" in type(module).__name__.lower() for module in base.model.modules())
    if not leak <= (_LEAK_OF_EXPERTS_NATS[base.dtype] if experts else _LEAK_NATS):
        raise LeakError(
            f"{type(base.model).__name__}: sequences that share a row change each other's loss (by "
            f"up to {leak:.2g} nats per token), as with recurrent layers or position biases; this "
            "architecture cannot be used"
        )


def _require_stock(packed: Tensor, alone: Tensor, *, base: FrozenBase) -> None:
    """Raises if a row's losses are not those of stock Transformers, one sequence at a time."""
    gaps = (packed - alone).abs()
    gap = (gaps.max() if base.dtype == torch.float32 else gaps.mean()).item()
    if not gap <= _STOCK_TOLERANCE_NATS[base.dtype]:
        raise LeakError(
            f"{type(base.model).__name__}: packed rows change its loss (by {gap:.2g} nats per "
            "token against stock Transformers); this architecture cannot be used"
        )


def stock_nll(base: FrozenBase, probe: Probe) -> Float[Tensor, " N"]:
    """Returns -ln p of each target by ordinary attention over one sequence, in nats."""
    ids = torch.tensor([probe.input_ids], device=base.device)
    with base.generating(()) as model:
        logits = model(input_ids=ids, use_cache=False).logits[0, probe.num_prompt - 1 : -1]
    return cross_entropy(logits, ids[0, probe.num_prompt :])


def _has_plain_head(base: FrozenBase) -> bool:
    """Returns True if the fast head gives the model's own loss; some models cap their logits."""
    if base.model.get_decoder() is base.model:
        return False
    row = pack(PROBES, device=base.device)
    with torch.inference_mode():
        own = base.nll_from_logits(row)
        try:
            fast = base.token_nll(row, routes=())
        except (AttributeError, TypeError):
            # What Transformers hands out as the decoder is a part of it.
            return False
    return bool((own - fast).abs().max() <= _HEAD_TOLERANCE_NATS[base.dtype])
