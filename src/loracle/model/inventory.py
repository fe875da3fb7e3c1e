"""Lists a model's linear layers by structure, without a table of names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from loracle.errors import ModelError, did_you_mean
from loracle.placement.inventory import Inventory, LinearModule, Role
from loracle.placement.llama_family import llama_family_inventory
from loracle.text import shortened

if TYPE_CHECKING:
    from torch import nn

# In order of precedence: "RecurrentGemmaAttention" is attention, "NemotronHMLP" under the name
# "mixer" is feed-forward.
_ROLE_WORDS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"attn|attention", re.IGNORECASE)),
    ("feed-forward", re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)),
    ("other", re.compile(r"mamba|mixer|recurrent|conv", re.IGNORECASE)),
)


def inventory_of(model: nn.Module) -> Inventory:
    """Returns every linear layer that text runs through; weights may be on the meta device.

    Linear means ``nn.Linear`` or GPT-2's ``Conv1D``, the classes of PEFT's ``all-linear``, but none
    that computes something of its own, as some routers do. Text runs through the decoder and the
    head: towers for images and sound, and heads for other tasks, would get no gradient. A layer
    index is the position in the decoder's main list of blocks.

    Raises:
        ModelError: If the model has no list of blocks, no linear layers, or adapters already.
    """
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ModelError("model: already carries adapters; take its inventory before adding them")
    from loracle.model.blocks import blocks_name_of, decoder_prefix
    from loracle.model.layers.four_bit import num_numbers

    decoder = decoder_prefix(model)
    blocks = blocks_name_of(model)
    if not any(True for _ in _linear_layers(model.get_submodule(blocks))):
        raise ModelError(f"model: {type(model).__name__} has no list of blocks with linear layers")
    head = (
        cast("Any", model).get_output_embeddings()
        if hasattr(model, "get_output_embeddings")
        else None
    )
    modules = tuple(
        _describe(name, linear, model=model, blocks=blocks, is_head=linear is head)
        for name, linear in _linear_layers(model)
        if linear is head or name.startswith(decoder)
    )
    return Inventory(
        modules=modules,
        num_layers=len(cast("nn.ModuleList", model.get_submodule(blocks))),
        total_params=sum(num_numbers(parameter) for parameter in model.parameters()),
    )


def inventory_from_architecture(architecture: Mapping[str, Any]) -> Inventory:
    """Returns the inventory of a model from its Transformers configuration, without any weights.

    Raises:
        ModelError: If Transformers cannot build a causal language model from it.
    """
    computed = llama_family_inventory(architecture)
    if computed is not None:
        return computed
    import torch
    from transformers import AutoModelForCausalLM

    from loracle.model.faults import model_faults

    model_type = _known_model_type(architecture)
    what = f"architecture '{model_type}': no causal model of it"
    with model_faults(what, reason=shortened), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(architecture))
    return inventory_of(model)


def transformers_config(architecture: Mapping[str, Any]) -> Any:
    """Returns the Transformers configuration with these fields of a ``config.json``."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_with_floats(architecture))


def _with_floats(value: Any) -> Any:
    """Returns a JSON value in which infinities and NaN, which Transformers 5 marks, are numbers."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else value


def _known_model_type(architecture: Mapping[str, Any]) -> str:
    from transformers import CONFIG_MAPPING

    model_types = [str(key) for key in CONFIG_MAPPING]
    model_type = architecture.get("model_type")
    if model_type is None:
        raise ModelError("architecture: model_type is missing, e.g. model_type: llama")
    if model_type not in model_types:
        hint = did_you_mean(str(model_type), model_types)
        raise ModelError(
            f"architecture: model_type '{model_type}' is unknown to Transformers{hint}"
        )
    return str(model_type)


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_modules():
        if not isinstance(child, nn.Linear | Conv1D):
            continue
        is_packed = hasattr(child.weight, "quant_state")
        if is_packed or type(child).forward in (nn.Linear.forward, Conv1D.forward):
            yield name, child


def _describe(
    name: str, linear: nn.Module, *, model: nn.Module, blocks: str, is_head: bool
) -> LinearModule:
    in_features, out_features, fan_in_fan_out = _shape(linear)
    kind = name.rpartition(".")[2]
    layer: int | None = None
    role: Role = "head" if is_head else "other"
    if name.startswith(f"{blocks}."):
        index, _, path = name.removeprefix(f"{blocks}.").partition(".")
        layer = int(index)
        # A router weighs experts rather than transforms features.
        router_name = re.search(r"router|(^|_)gate$", kind, re.IGNORECASE)
        is_router = out_features < in_features and bool(
            router_name or "router" in type(linear).__name__.lower()
        )
        role = "other" if is_router else _role(path, block=model.get_submodule(f"{blocks}.{index}"))
    return LinearModule(name, kind, layer, in_features, out_features, role, fan_in_fan_out)


def _shape(linear: Any) -> tuple[int, int, bool]:
    """Returns (in_features, out_features, weight is stored transposed)."""
    from torch import nn

    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features, False
    in_features, out_features = linear.weight.shape
    return int(in_features), int(out_features), True


def _role(path: str, *, block: nn.Module) -> Role:
    """Returns the role of the linear layer at ``path`` in a block.

    The innermost enclosing module whose class or name matches decides; for a layer directly in the
    block (OPT's fc1) its own name does. Everything else is feed-forward.
    """
    enclosing = path.split(".")[:-1]
    evidence = [path] if not enclosing else []
    for depth in range(len(enclosing), 0, -1):
        inner = block.get_submodule(".".join(enclosing[:depth]))
        evidence += [type(inner).__name__, enclosing[depth - 1]]
    for text in evidence:
        for role, words in _ROLE_WORDS:
            if words.search(text):
                return role
    return "feed-forward"
