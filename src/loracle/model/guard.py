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
# assumed: other shapes round otherwise; what leaks or looks elsewhere costs more than this
_STOCK_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# measured (tiny models of 27 types): at most 5e-7 if sound, at least 0.055 if sequences leak, in
# every dtype; experts may round otherwise in 16 bits when other tokens share their product
_LEAK_NATS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# Tokens of two sequences that take turns at the start of a row, and of the one after them.
_LENGTHS = (24, 24, 17)


def checked(base: FrozenBase) -> FrozenBase:
    """Returns the base with ``plain_head`` set, after trying it on packed rows.

    Raises:
        ModelError: If sequences of a row change each other's loss, or a row gives another loss than
            stock Transformers gives each of its sequences.
    """
    name = type(base.model).__name__
    first, other, second = _probes(base)
    with model_faults(f"{name}: cannot run on packed rows"), torch.inference_mode():
        row = pack((first, second), device=base.device)
        packed = base.nll_from_logits(row)
        beside_other = base.nll_from_logits(pack((other, second), device=base.device))
        alone = torch.cat([stock_nll(base, probe) for probe in (first, second)])
    if not torch.isfinite(alone).all():
        raise ModelError(f"{name}: the untuned model gives NaN or infinity")
    start = row.num_targets[0]
    _require_sealed(packed[start:], beside_other[start:], base=base)
    _require_stock(packed, alone, base=base)
    return replace(base, plain_head=_has_plain_head(base))


def _probes(base: FrozenBase) -> tuple[Probe, Probe, Probe]:
    """Returns two sequences of one length that differ, and a third."""
    ids = probe_of(base, tokens=sum(_LENGTHS)).input_ids
    first, second, _ = accumulate(_LENGTHS)
    return Probe(ids[:first]), Probe(ids[first:second]), Probe(ids[second:])


def probe_of(base: FrozenBase, *, tokens: int) -> Probe:
    """Returns a sequence of tokens that a text can have, drawn from the whole vocabulary."""
    config = base.model.config.to_dict()
    fields = [*config.items()]
    fields += [item for part in config.values() if isinstance(part, dict) for item in part.items()]
    special = {str(value) for key, value in fields if re.search("token_(id|index)$", str(key))}
    special |= {str(id_) for id_ in base.tokenizer.all_special_ids}
    rows = base.model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = [i for i in torch.randperm(rows, generator=draw).tolist() if str(i) not in special]
    return Probe(tuple((ids * -(-tokens // len(ids)))[:tokens]))


def _require_sealed(packed: Tensor, beside_other: Tensor, *, base: FrozenBase) -> None:
    """Raises if a sequence's loss depends on what stands before it in the row.

    Both rows have the same shape, so a sound model gives the same numbers in 16 bits too.
    """
    leak = (packed - beside_other).abs().max().item()
    if not leak <= _LEAK_NATS[base.dtype]:
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
