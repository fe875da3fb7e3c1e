"""A base without weights: the modules that will run, with tensors that have a shape and no bytes.

The structure is built on the meta device, PEFT's layers included, and then filled with fake tensors
that say they are on the CPU. Fake tensors from the start would not do: PEFT moves its layers, and
moving swaps tensors, which fake ones refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerFast

from loracle.forecast.shape_cache import KnownShapes
from loracle.model.adapters import Adapter, attach_adapter
from loracle.model.base import FrozenBase
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.four_bit import NF4, install_unpacked_products
from loracle.model.layers.norm import install_fast_norms
from loracle.model.whole import whole_model
from loracle.placement import ModulePlan
from loracle.quiet import quiet_transformers

# source: bitsandbytes 0.50, quantize_4bit: numbers to a scale, and scales to one of theirs
_BLOCK, _BLOCKS_OF_SCALES = 64, 256


class _MadeUpValues(TorchFunctionMode):
    """Answers where the code asks a tensor for its numbers: they are finite, and tests hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _zeros(args[0].shape)
        if func in (Tensor.item, Tensor.__float__):
            return 0.0
        if func in (Tensor.__bool__, torch.equal, torch.allclose):
            return True
        return func(*args, **(kwargs or {}))


def _zeros(shape: Sequence[int]) -> Any:
    """Returns nested lists of that shape, or a number."""
    if not shape:
        return 0.0
    return [_zeros(shape[1:]) for _ in range(shape[0])]


Kind = Literal["cpu", "gpu", "old gpu"]
"""Whose code runs: a CPU's, a GPU's, or that of a GPU without bf16 and packed attention."""


@contextmanager
def pretending(kind: Kind = "cpu") -> Iterator[None]:
    """Makes tensors that are made inside the block have no bytes, and the code take their word.

    A CPU's are fake tensors; a GPU's are on the meta device, which is faster, and its attention
    kernels, which only it has, are called by name.

    Args:
        kind: Whose code runs.
    """
    _forget_constants()
    try:
        with ExitStack() as inside:
            if kind == "cpu":
                inside.enter_context(FakeTensorMode())
            else:
                for patch in _gpu_patches(kind):
                    inside.enter_context(patch)
                inside.enter_context(KnownShapes())
            inside.enter_context(_MadeUpValues())
            yield
    finally:
        _forget_constants()


def _gpu_patches(kind: Kind) -> list[Any]:
    """Returns what makes code on the meta device go the way that it goes on a GPU."""
    attention = "loracle.model.layers.attention"
    scaler = torch.amp.GradScaler
    patches: list[Any] = [
        # Neither knows the meta device; both are asked for by the device's name.
        mock.patch("torch.is_autocast_enabled", return_value=False),
        mock.patch("torch.amp.GradScaler", lambda _, **given: scaler("cpu", **given)),
    ]
    if kind == "gpu":
        return [*patches, mock.patch(f"{attention}.attends_variable_length", return_value=True)]
    return [*patches, mock.patch(f"{attention}.scaled_dot_product_attention", _efficient_attention)]


def _efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """Returns what the kernel returns that PyTorch chooses on GPUs before compute capability 8."""
    assert not enable_gqa, "that kernel takes no groups"
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )[0]
    return found


def _forget_constants() -> None:
    """Drops the tensors that the engine keeps between steps: fake and real ones must not mix."""
    from loracle.model.layers import dropout, stacked, varlen_attention

    for module in (dropout, stacked, varlen_attention):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def pretend_base(
    architecture: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    trains: bool = False,
    quantization: str | None = None,
) -> FrozenBase:
    """Returns a model of this architecture on the meta device, as `load_base` would set it up.

    Args:
        architecture: Fields of a Transformers configuration, ``model_type`` among them.
        dtype: As of `load_base`.
        trains: As of `load_base`.
        quantization: As of `load_base`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_packed_attention()
    meta = torch.device("meta")
    with meta, _MadeUpValues(), quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**architecture),
            dtype=torch.float32 if trains else dtype,
            attn_implementation=PACKED,
        )
        model = model.eval().requires_grad_(trains)
        install_fast_norms(model)
        if quantization == NF4:
            _pack(model, dtype=dtype)
            install_unpacked_products(model)
    return FrozenBase(
        model=model,
        tokenizer=unspoken_tokenizer(),
        device=meta,
        dtype=dtype,
        trains=trains,
        quantization=quantization,
    )


def _pack(model: Any, *, dtype: torch.dtype) -> None:
    """Gives every linear layer but the head a weight in the shape of a packed one."""
    from bitsandbytes.functional import QuantState

    head = model.get_output_embeddings()
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        count = module.weight.numel()
        blocks = -(-count // _BLOCK)
        packed: Any = nn.Parameter(
            torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False
        )
        packed.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8),
            shape=torch.Size((module.out_features, module.in_features)),
            code=torch.empty(16),
            blocksize=_BLOCK,
            quant_type=NF4,
            dtype=dtype,
            offset=torch.empty(()),
            state2=QuantState(
                absmax=torch.empty(-(-blocks // _BLOCKS_OF_SCALES)),
                code=torch.empty(256),
                blocksize=_BLOCKS_OF_SCALES,
                dtype=torch.float32,
            ),
        )
        module.weight = packed


def unspoken_tokenizer() -> PreTrainedTokenizerFast:
    """Returns one that knows a single word: nothing is tokenized while planning."""
    words = models.WordLevel(vocab={"?": 0}, unk_token="?")  # noqa: S106 - a word, no secret
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="?")  # noqa: S106


def pretend_adapter(
    base: FrozenBase, *, plan: ModulePlan, dropout: float, seed: int = 0
) -> Adapter:
    """Returns what a run trains on a base that is still on the meta device."""
    with torch.device("meta"), _MadeUpValues():
        if plan.is_full:
            return whole_model(base, name="default", plan=plan)
        return attach_adapter(
            base, name="default", plan=plan, dropout=dropout, seed=seed, model_source="planned"
        )


def fill(base: FrozenBase, adapter: Adapter) -> Adapter:
    """Puts tensors in the place of those on the meta device; returns the adapter that has them.

    Called inside `pretending`, of a CPU; a GPU's stay where they are. Tied parameters stay tied.
    """
    base.device = torch.device("cpu")
    made: dict[int, Tensor] = {}
    # Objects are kept alive until the end, so that no two have the same id.
    before: list[Tensor] = []
    for module in base.model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                before.append(tensor)
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor)
                held[name] = made[id(tensor)]
    return replace(adapter, parameters=_taken(adapter.parameters, made=made))


def _taken(
    parameters: Mapping[str, nn.Parameter], *, made: Mapping[int, Tensor]
) -> dict[str, nn.Parameter]:
    found = {}
    for name, parameter in parameters.items():
        tensor = made[id(parameter)]
        assert isinstance(tensor, nn.Parameter), f"{name} is a buffer"
        found[name] = tensor
    return found


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return empty
    made: Any = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    state: Any = getattr(tensor, "quant_state", None)
    if state is not None:
        for each in (state, state.state2):
            each.absmax, each.code = _like(each.absmax), _like(each.code)
        state.offset = _like(state.offset)
        made.quant_state = state
    filled: Tensor = made
    return filled
