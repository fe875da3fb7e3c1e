"""Compares a base with stock Transformers, and a row with another, before the base is used.

A model with a recurrent state, a window that only its mask knows, or an attention of its own would
silently mix the sequences of a row. Comparing numbers needs no list of architectures.

Shapes: N targets.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from loracle.data.packing import pack
from loracle.errors import ModelError
from loracle.model.base import PROBES, FrozenBase, Probe, cross_entropy
from loracle.model.faults import model_faults

# assumed: a larger difference between the fast head and the model's own is more than rounding
_HEAD_TOLERANCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# The largest of a token in fp32, the mean in 16 bits, where other shapes round otherwise.
# measured (SmolLM2-135M, CPU, random tokens): 0 in fp32, a mean of 0.07 in bf16
_STOCK_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
# measured (tiny models of 37 types, CPU): at most 5e-7 if sound, at least 7e-3 if sequences leak.
# Rows of one shape give the same bits in 16 bits too, except where experts share a product with
# other tokens and round otherwise (assumed).
_LEAK_NATS = 1e-4
_LEAK_OF_EXPERTS_NATS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Tokens of two sequences that take turns at the start of a row, and of the one after them.
_LENGTHS = (24, 24, 17)
_LENGTH_NAMES = re.compile("window|chunk|local|stride|block_size|original", re.IGNORECASE)


def checked(base: FrozenBase) -> FrozenBase:
    """Returns the base with ``plain_head`` set, after trying it on packed rows.

    Raises:
        ModelError: If sequences of a row change each other's loss, or a row gives another loss than
            stock Transformers gives each of its sequences.
    """
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
    named = [value for key, value in config.items() if _LENGTH_NAMES.search(key)]
    if any(type(value) is int and 1 < value < tokens for value in named):
        first, _, _ = _LENGTHS
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
        raise ModelError(
            f"{type(base.model).__name__}: sequences that share a row change each other's loss (by "
            f"up to {leak:.2g} nats per token), as with recurrent layers or position biases; this "
            "architecture cannot be used"
        )


def _require_stock(packed: Tensor, alone: Tensor, *, base: FrozenBase) -> None:
    """Raises if a row's losses are not those of stock Transformers, one sequence at a time."""
    gaps = (packed - alone).abs()
    gap = (gaps.max() if base.dtype == torch.float32 else gaps.mean()).item()
    if not gap <= _STOCK_TOLERANCE_NATS[base.dtype]:
        raise ModelError(
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
