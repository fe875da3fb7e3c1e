"""A base without weights: the real modules, with tensors that have a shape and no storage.

The model and PEFT's layers are built on the meta device. For a CPU they are then filled with fake
CPU tensors; fake tensors from the start would not do, because PEFT moves its layers, moving swaps
tensors, and fake tensors cannot be swapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from loracle.forecast.devices import Device
from loracle.forecast.shape_cache import CachedShapes
from loracle.forecast.small_model import has_plain_head
from loracle.model.adapters import Adapter, attach_adapter
from loracle.model.base import FrozenBase
from loracle.model.inventory import transformers_config
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.fast_parts import install_fast_parts
from loracle.model.layers.four_bit import NF4, install_unpacked_products
from loracle.model.layers.kept import forget_kept
from loracle.model.miniature import one_word_tokenizer
from loracle.model.reach import peft_faults
from loracle.model.whole import whole_model
from loracle.placement import ModulePlan
from loracle.screen import quiet_transformers

# source: bitsandbytes 0.50, quantize_4bit: numbers to a scale, and scales to one of theirs
_BLOCK, _BLOCKS_OF_SCALES = 64, 256
_EXPERTS = "transformers.integrations.moe"


class _FakeValues(TorchFunctionMode):
    """Supplies values where code reads a tensor's numbers: zeros, and every comparison holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _zeros(args[0].shape)
        if func in (Tensor.item, Tensor.__float__):
            return 0.0
        if func in (Tensor.__bool__, torch.equal, torch.allclose):
            return True
        return func(*args, **(kwargs or {}))


def _zeros(shape: Sequence[int]) -> Any:
    """Returns nested lists of that shape; of the empty shape, a number."""
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


Kind = Literal["cpu", "gpu", "old gpu"]
"""Which code path runs: a CPU's, a GPU's, or that of a GPU without bf16 and packed attention."""


def kind_of(device: Device, *, plan: ModulePlan) -> Kind:
    """Returns which code path runs on a device.

    GPUs without bf16 attend sequence by sequence, to the same number of bytes. PyTorch's own
    attention, which full fine-tuning needs, does not support the meta device: it is traced as on a
    CPU.
    """
    if not device.is_gpu or plan.is_full:
        return "cpu"
    return "gpu" if device.has_bf16 else "old gpu"


@contextmanager
def model_without_weights(
    architecture: Mapping[str, Any],
    *,
    plan: ModulePlan,
    device: Device,
    dtype: torch.dtype,
    dropout: float,
    quantization: str | None = None,
) -> Iterator[tuple[FrozenBase, Adapter]]:
    """Yields a base and the adapter of a plan; code inside the block takes the device's path.

    ``architecture`` holds the fields of a Transformers configuration, ``model_type`` among them.
    """
    base = meta_base(architecture, dtype=dtype, trains=plan.is_full, quantization=quantization)
    base.plain_head = has_plain_head(architecture)
    adapter = meta_adapter(base, plan=plan, dropout=dropout)
    kind = kind_of(device, plan=plan)
    with fake_tensors(kind):
        yield base, fill(base, adapter) if kind == "cpu" else adapter


@contextmanager
def fake_tensors(kind: Kind = "cpu") -> Iterator[None]:
    """Gives tensors that are made inside the block no storage.

    A CPU's are fake tensors; a GPU's are on the meta device, which is faster, and the attention
    kernels that only a GPU has are called by name.
    """
    # Fake tensors and real ones must not mix.
    forget_kept()
    try:
        with ExitStack() as inside:
            inside.enter_context(mock.patch(f"{_EXPERTS}._can_use_grouped_mm", _groups_products))
            if kind == "cpu":
                inside.enter_context(FakeTensorMode())
            else:
                for patch in _gpu_patches(kind):
                    inside.enter_context(patch)
                inside.enter_context(CachedShapes())
            inside.enter_context(_FakeValues())
            yield
    finally:
        forget_kept()


def _groups_products(_input: Tensor, weight: Tensor, _ends: Tensor) -> bool:
    """Returns whether experts share PyTorch's grouped product, which is traced in bf16 only.

    Otherwise Transformers' own is traced: GPUs without bf16 run it; on a CPU in fp32 it counts a
    gradient of one layer's experts too much.
    """
    return weight.dtype == torch.bfloat16


def _gpu_patches(kind: Kind) -> list[Any]:
    """Returns the patches that make code on the meta device take a GPU's path."""
    attention = "loracle.model.layers.attention"
    scaler = torch.amp.GradScaler
    patches: list[Any] = [
        # Neither supports the meta device; both are looked up by the device's name.
        mock.patch("torch.is_autocast_enabled", return_value=False),
        mock.patch("torch.amp.GradScaler", lambda _, **given: scaler("cpu", **given)),
    ]
    if kind == "gpu":
        return [*patches, mock.patch(f"{attention}.attends_variable_length", return_value=True)]
    return [*patches, mock.patch(f"{attention}.scaled_dot_product_attention", _efficient_attention)]


def _efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """Calls the kernel that PyTorch chooses on GPUs before compute capability 8."""
    assert not enable_gqa, "that kernel takes no groups"
    attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )[0]
    return attended


def meta_base(
    architecture: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    trains: bool = False,
    quantization: str | None = None,
) -> FrozenBase:
    """Returns a model of this architecture on the meta device, set up as `load_base` does."""
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    meta = torch.device("meta")
    with meta, _FakeValues(), quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            transformers_config(architecture),
            dtype=torch.float32 if trains else dtype,
            attn_implementation=PACKED,
        )
        model = model.eval().requires_grad_(trains)
        install_fast_parts(model)
        if quantization == NF4:
            _pack(model, dtype=dtype)
            install_unpacked_products(model)
    return FrozenBase(
        model=model,
        tokenizer=one_word_tokenizer(),
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


def meta_adapter(base: FrozenBase, *, plan: ModulePlan, dropout: float, seed: int = 0) -> Adapter:
    """Returns the adapter, or the whole model, that a run trains, on the meta device."""
    with torch.device("meta"), _FakeValues():
        if plan.is_full:
            return whole_model(base, name="default", plan=plan)
        with peft_faults(base, plan=plan):
            return attach_adapter(
                base, name="default", plan=plan, dropout=dropout, seed=seed, model_source="planned"
            )


def fill(base: FrozenBase, adapter: Adapter) -> Adapter:
    """Replaces meta tensors by fake CPU tensors; returns the adapter that holds them.

    Called inside `fake_tensors` of a CPU. Tied parameters stay tied.
    """
    base.device = torch.device("cpu")
    made: dict[int, Tensor] = {}
    # Replaced tensors are kept alive until the end, so that no two have the same id.
    replaced: list[Tensor] = []
    for module in base.model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                replaced.append(tensor)
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor)
                held[name] = made[id(tensor)]
    parameters: Any = {name: made[id(old)] for name, old in adapter.parameters.items()}
    return replace(adapter, parameters=parameters)


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return empty
    made: Any = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    state: Any = getattr(tensor, "quant_state", None)
    if state is not None:
        for scales in (state, state.state2):
            scales.absmax, scales.code = _like(scales.absmax), _like(scales.code)
        state.offset = _like(state.offset)
        made.quant_state = state
    filled: Tensor = made
    return filled
