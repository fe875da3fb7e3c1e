"""A small random model of an architecture: what its code does, asked before any weights are here.

Whether sequences of a row change each other, whether the head is one product, and how far positions
reach depend on an architecture's code and not on its widths. So the checks that a run makes of its
base are made of a narrow, shallow one with random weights, in a second or two on a CPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch

from loracle.config.run import Config
from loracle.errors import ModelError
from loracle.forecast.lengths import Lengths
from loracle.model.base import PROBES, FrozenBase
from loracle.model.faults import is_out_of_memory
from loracle.model.guard import checked, require_long_rows, stock_nll
from loracle.model.inventory import transformers_config
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.fast_parts import install_fast_parts
from loracle.model.limits import require_reach
from loracle.model.load import reason_not_loaded
from loracle.model.miniature import one_word_tokenizer
from loracle.model.reach import require_reached
from loracle.placement import ModulePlan
from loracle.placement.llama_family import llama_family_inventory
from loracle.placement.plan import FULL
from loracle.screen import quiet_transformers

# assumed: every pattern of layers and experts repeats within so many
_LAYERS = 10
_EXPERTS = 16
# assumed: more tokens than a test pass needs
_VOCABULARY = 512
# assumed: narrow enough to be quick, wide enough that products differ
_HEAD_SIZE, _WIDTH = 4, 16
# assumed: more would take longer than the rest of a plan; such a model is not tried
_MOST_PARAMS = 150_000_000

_IS_DEPTH = re.compile(r"(^|_)(num|n)_(\w*_)?layers?$|^(encoder|decoder)_layers$|^depth$")
_COUNTS_LAYERS = re.compile(r"layer|first_k|skip")
_IS_EXPERTS = re.compile(r"^(num|n)_(\w+_)?experts$|^moe_num_experts$")
_IS_WIDTH = re.compile(
    r"(^|_)(size|dim|rank|width|n_embd|n_inner|d_\w+|embd|hidden|inner)(_|$)|ffn|channels"
)
_IS_NO_WIDTH = re.compile(
    r"vocab|window|chunk|block|kernel|group|batch|image|patch|tile|num_|conv|max|token|position|"
    r"layer_idx|expansion|ratio|theta|type|context|downsample|merge"
)
# Widths that need not be whole multiples of another.
_IS_FREE = re.compile(r"inter|inner|ffn|rank|shared")
_PARTED = (
    ("hidden_size", "num_attention_heads"),
    ("n_embd", "n_head"),
    ("d_model", "decoder_attention_heads"),
)


def small_architecture(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a narrow and shallow model of the same kind.

    Heads, positions and windows stay; widths become a common fraction of themselves.
    """
    whole = transformers_config(architecture).to_dict()
    named = {**whole, "model_type": architecture["model_type"]}
    return _shrunken(named, divisor=_divisor(named))


def _divisor(fields: Mapping[str, Any]) -> int:
    """Returns the largest power of two that leaves every width whole and wide enough."""
    found = _largest_divisor([*_widths(fields), *_parts(fields)])
    # Heads of a size of their own seldom have to be parts of the model's width.
    own = fields.get("head_dim") is not None
    return _largest_divisor(_widths(fields)) if found == 1 and own else found


def _largest_divisor(widths: Iterable[tuple[int, int, bool]]) -> int:
    divisor, widths = 1, list(widths)
    while widths and all(
        (is_free or width % (2 * divisor) == 0) and width // (2 * divisor) >= least
        for width, least, is_free in widths
    ):
        divisor *= 2
    return divisor


def _widths(fields: Mapping[str, Any]) -> Iterator[tuple[int, int, bool]]:
    """Yields every width of a configuration, the smallest useful one, and whether it is free."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _widths(value)
        elif _is_width(key, value):
            # Rotation takes the two halves of a head.
            parts, least = (2, _HEAD_SIZE // 2) if "head" in key else (1, _WIDTH)
            width = value // parts
            yield width, min(least, width), _IS_FREE.search(key) is not None


def _parts(fields: Mapping[str, Any]) -> Iterator[tuple[int, int, bool]]:
    """Yields the part of the model's width that each head takes."""
    for whole, parts in _PARTED:
        width, heads = fields.get(whole), fields.get(parts)
        if type(width) is int and type(heads) is int and heads and width % heads == 0:
            own = fields.get("head_dim") is not None
            yield (
                (width // heads, 1, False) if own else (width // heads // 2, _HEAD_SIZE // 2, False)
            )


def _is_width(key: str, value: object) -> bool:
    return bool(
        type(value) is int
        and value > _HEAD_SIZE
        and _IS_WIDTH.search(key)
        and not _IS_NO_WIDTH.search(key)
    )


def _shrunken(fields: Mapping[str, Any], *, divisor: int) -> dict[str, Any]:
    depth = max((value for key, value in fields.items() if _is_depth(key, value)), default=0)
    shrunken: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping) and "per_layer" not in key:
            shrunken[key] = _shrunken(value, divisor=divisor)
        elif type(value) is int:
            shrunken[key] = _smaller(key, value, divisor=divisor, depth=depth)
        else:
            shrunken[key] = _shallower(key, value, depth=depth) if depth > _LAYERS else value
    return shrunken


def _smaller(key: str, value: int, *, divisor: int, depth: int) -> int:
    if _is_width(key, value):
        return value // divisor
    if _IS_EXPERTS.search(key):
        return min(value, _EXPERTS)
    if re.search(r"vocab_size|token_(id|index)$", key):
        return min(value, _VOCABULARY if "vocab" in key else _VOCABULARY - 1)
    if depth <= _LAYERS:
        return value
    if _is_depth(key, value):
        return -(-value * _LAYERS // depth)
    if _COUNTS_LAYERS.search(key) and 1 < value < depth:
        return max(1, value * _LAYERS // depth)
    return value


def _shallower(key: str, value: Any, *, depth: int) -> Any:
    """Returns a list or table of layers without those that are left out."""
    if isinstance(value, Mapping):
        return {layer: each for layer, each in value.items() if not _is_beyond(layer)}
    if isinstance(value, list) and len(value) == depth:
        return value[:_LAYERS]
    if isinstance(value, list) and "layer" in key:
        return [each for each in value if not _is_beyond(each)]
    return value


def _is_beyond(layer: object) -> bool:
    return str(layer).isdigit() and int(str(layer)) >= _LAYERS


def _is_depth(key: str, value: object) -> bool:
    return type(value) is int and _IS_DEPTH.search(key) is not None


def require_usable(
    architecture: Mapping[str, Any], *, config: Config, lengths: Lengths, is_full: bool
) -> None:
    """Checks what of a run's base its configuration tells, in the words of a run.

    Raises:
        ModelError: If packed rows, the longest sequences or full fine-tuning cannot be had with it.
    """
    base = small_base(architecture, name=config.model)
    if base is None:
        return
    require_reach(
        base,
        tokens=config.data.max_tokens,
        what="the longest sequences",
        remedy="set data.max_tokens to at most {}",
    )
    require_long_rows(base, tokens=config.data.max_tokens)
    prompt, _ = lengths.example()
    if config.eval.generate_examples:
        require_reach(
            base,
            tokens=prompt + config.eval.max_new_tokens,
            what="the longest prompt and eval.max_new_tokens",
            remedy="lower data.max_tokens or eval.max_new_tokens, or set eval.generate_examples=0",
        )
    if is_full:
        require_reached(base, plan=ModulePlan(FULL, (), 0))


def has_plain_head(architecture: Mapping[str, Any]) -> bool:
    """Returns whether the logits are one product; taken to be where no small model can be made."""
    try:
        base = small_base(architecture, name="")
    except ModelError:
        return True
    return base is None or base.plain_head


def small_base(architecture: Mapping[str, Any], *, name: str) -> FrozenBase | None:
    """Returns a small base of this architecture, checked as a run checks its own.

    None where no small model can be made, or none is needed: Llama and its nearest kin are known.

    Raises:
        ModelError: If packed rows cannot be used with it, in the words of a run.
    """
    if llama_family_inventory(architecture) is not None:
        return None
    found = _small_base(json.dumps(architecture, sort_keys=True, default=str))
    if isinstance(found, ModelError):
        raise ModelError(str(found).replace(_NAME, name, 1))
    return found


_NAME = "<name>"


@lru_cache(maxsize=8)
def _small_base(architecture: str) -> FrozenBase | ModelError | None:
    try:
        base = random_base(json.loads(architecture))
        return None if base is None else checked(base)
    except ModelError as error:
        return error


def random_base(architecture: Mapping[str, Any], *, shrinks: bool = True) -> FrozenBase | None:
    """Returns a base of random numbers; None if it cannot be made or does not run by itself."""
    register_packed_attention()
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(0)
            small = small_architecture(architecture) if shrinks else architecture
            model = _random_model(small)
        if model is None:
            return None
        base = FrozenBase(
            model=model,
            tokenizer=one_word_tokenizer(),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        with torch.inference_mode():
            sound = torch.isfinite(stock_nll(base, PROBES[0])).all()
        return base if sound else None
    # Narrowed fields need not make a model, and a library then raises anything.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if PACKED in error.args:
            why = reason_not_loaded(error)
            raise ModelError(f"{_NAME}: Transformers cannot load this model ({why})") from error
        return None


def _random_model(architecture: Mapping[str, Any]) -> Any:
    """Returns a model whose numbers are all random; None if it would not be small."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(transformers_config(architecture))
    if sum(parameter.numel() for parameter in shape.parameters()) > _MOST_PARAMS:
        return None
    model = AutoModelForCausalLM.from_config(
        transformers_config(architecture), dtype=torch.float32, attn_implementation=PACKED
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases of 1 and 0 would hide what they do.
            drawn = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * drawn)
    model = model.eval().requires_grad_(False)
    install_fast_parts(model)
    return model
