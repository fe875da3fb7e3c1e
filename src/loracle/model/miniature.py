"""A tiny model of an architecture: of each kind of layer a few narrow ones, with random weights.

What a loss may depend on is a matter of the architecture, not of its size, so that this can be
tried in fp32 on any machine, before anything of a model but its configuration is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from loracle.errors import ModelError
from loracle.model.base import FrozenBase
from loracle.model.blocks import blocks_name_of
from loracle.model.faults import model_faults
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.fast_parts import install_fast_parts
from loracle.screen import quiet_transformers

SEQUENCE, ROW = 28, 48
"""Most tokens of a sequence on which a miniature is tried, and of the row that it stands in."""
# In (SEQUENCE, ROW): a row reaches these lengths, a sequence does not. Below SEQUENCE: both do.
_LENGTH, _POSITIONS, _EXCEEDED = 32, 40, 16
_VOCABULARY = 256
_FEWEST_LAYERS = 2
# assumed: it takes longer than a second to fill and run more than this
_MOST_PARAMETERS = 30_000_000
_MOST_SCALES = 4
# Enough for every rule that chooses experts, in groups or not.
_MOST_EXPERTS = 64
_WIDEST_BETWEEN = 512

_HEADS = re.compile(r"(?<!d_)heads?$|n_groups$")
_EXPERTS = re.compile(r"num_(local_|routed_)?experts$|n_routed_experts$")
_BETWEEN = re.compile(r"intermediate|ffn|n_inner")
_WIDTHS = re.compile(
    r"hidden_(size|dim)|d_model|n_embd|embed_dim|embedding_size|d_ssm|lru_width"
    r"|word_embed_proj_dim|^dim$"
)
_LENGTHS = re.compile(r"window|chunk|local|stride|block_size|original", re.IGNORECASE)
_MOST_POSITIONS = re.compile(r"max_position|n_positions|n_ctx|max_seq_len|seq_length")
_NO_LENGTHS = re.compile(r"layer|expert|freq|theta|head")
_PLACES = re.compile(r"idx|index|_id$|number")


def names_length(key: str) -> bool:
    """Returns whether a field of a configuration is a number of tokens that changes attention."""
    return bool(_LENGTHS.search(key)) and not _NO_LENGTHS.search(key)


def miniatures(
    config: PreTrainedConfig, *, tokens: int | None, keeps_lengths: bool = False
) -> Iterator[FrozenBase]:
    """Yields tiny models of a configuration in fp32 on the CPU, the smallest first.

    An architecture that does not allow a size cannot be built in it, or built and not run: the next
    one is nearer to the configuration's own.

    Args:
        config: Of the whole model, with its own class in Transformers.
        tokens: Of the longest sequence that is to be used: sequences of `SEQUENCE` tokens exceed
            lengths that it exceeds. None: only rows of `ROW` tokens exceed any length.
        keeps_lengths: True leaves windows and the number of positions as they are.
    """
    register_packed_attention()
    try:
        with model_faults("miniature"):
            scales = _scales(config.get_text_config())
    except ModelError:
        return
    for scale in scales:
        try:
            with model_faults("miniature"):
                small = _shrunk(
                    _fields(config),
                    smaller=partial(
                        _smaller, scale=scale, tokens=tokens, keeps_lengths=keeps_lengths
                    ),
                )
                base = _base(config, small)
        except ModelError:
            continue
        if base is not None:
            yield base


def _scales(text: Any) -> list[int]:
    """Returns by how much widths may be divided so that the number of heads stays whole."""
    heads = getattr(text, "num_attention_heads", None)
    whole = heads if isinstance(heads, int) and heads > 0 else max(1, text.hidden_size // 32)
    few = [2, 1, *range(3, whole + 1)] if whole > 1 else [1]
    return [whole // kept for kept in few if whole % kept == 0][:_MOST_SCALES]


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "quantization_config"}


def _shrunk(value: Any, *, key: str = "", smaller: Callable[[int, str], int]) -> Any:
    """Returns what a field of a configuration, or all of it, is in a miniature."""
    if isinstance(value, dict):
        return {name: _shrunk(item, key=str(name), smaller=smaller) for name, item in value.items()}
    if isinstance(value, list):
        return [_shrunk(item, key=key, smaller=smaller) for item in value]
    return smaller(value, key) if type(value) is int and value > 0 else value


def _smaller(value: int, key: str, *, scale: int, tokens: int | None, keeps_lengths: bool) -> int:
    """Returns what a number is in a miniature with widths divided by ``scale``."""
    if names_length(key):
        fewer = min(value, _EXCEEDED if tokens is not None and value < tokens else _LENGTH)
        return value if keeps_lengths else fewer
    if "vocab_size" in key:
        return min(value, _VOCABULARY)
    if re.search(r"token_(id|index)$", key):
        return value % _VOCABULARY
    if _HEADS.search(key):
        return max(1, value // scale)
    if _EXPERTS.search(key):
        return min(value, _MOST_EXPERTS)
    if _WIDTHS.search(key) or _BETWEEN.search(key):
        # Grouped products need rows of whole 16 bytes.
        narrow = min(value, -(-value // scale // 8) * 8)
        return min(narrow, _WIDEST_BETWEEN) if _BETWEEN.search(key) else narrow
    is_bound = _MOST_POSITIONS.search(key) and not keeps_lengths
    return min(value, _POSITIONS) if is_bound else value


def _base(config: PreTrainedConfig, small: dict[str, Any]) -> FrozenBase | None:
    """Returns the miniature with these fields; None if even it is large."""
    kind = type(config)
    whole = _model(kind.from_dict(small), device="meta")
    depth = config.get_text_config().num_hidden_layers
    kept = _kinds(whole)
    few = _with_layers(small, depth, max(_FEWEST_LAYERS, max(kept.values()) + 1))
    cut = _model(kind.from_dict(few), device="meta")
    if _kinds(cut).keys() != kept.keys():
        few, cut = small, whole
    if sum(parameter.numel() for parameter in cut.parameters()) > _MOST_PARAMETERS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(kind.from_dict(few), device="cpu")
        _spread(model)
    install_fast_parts(model)
    return FrozenBase(
        model=model,
        tokenizer=one_word_tokenizer(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def _model(config: PreTrainedConfig, *, device: str) -> PreTrainedModel:
    with torch.device(device), quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=PACKED
        )
    return model.eval().requires_grad_(False)


def _kinds(model: PreTrainedModel) -> dict[object, int]:
    """Returns the first layer of each kind: other modules, shapes or settings are another kind."""
    first: dict[object, int] = {}
    for index, block in enumerate(model.get_submodule(blocks_name_of(model)).children()):
        first.setdefault(tuple(_described(block)), index)
    return first


def _described(block: nn.Module) -> Iterator[object]:
    for name, module in block.named_modules():
        settings = [
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | int | str | None) and not _PLACES.search(key)
        ]
        shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        yield name, type(module), tuple(settings), tuple(shapes)


def _with_layers(tree: Any, depth: int, kept: int, *, key: str = "") -> Any:
    """Returns a configuration of ``depth`` layers with the first of them only."""
    if isinstance(tree, dict):
        return {
            name: _with_layers(item, depth, kept, key=str(name))
            for name, item in tree.items()
            if not (str(name).isdigit() and int(name) >= kept)
        }
    if isinstance(tree, list | str) and len(tree) == depth:
        return tree[:kept]
    return kept if tree == depth and type(tree) is int and "layer" in key else tree


def _spread(model: PreTrainedModel) -> None:
    """Draws weights so large that attention is not uniform and the model is sure of something."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv1d | Conv1D):
            fan_in = module.weight.numel() / max(1, module.weight.shape[0])
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(fan_in))


def one_word_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of a single word, for models that are given no text."""
    words = models.WordLevel(vocab={"?": 0}, unk_token="?")  # noqa: S106 - a word, no secret
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="?")  # noqa: S106
