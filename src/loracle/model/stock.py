"""Stock Transformers over the weights of a base: a second model without a second copy.

The modules are built anew from the folder's configuration, with Transformers' own attention, norms
and layers; only the tensors are the base's. So a check by stock code fits where the base fits.
"""

from __future__ import annotations

from pathlib import Path

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loracle.errors import ModelError
from loracle.model.base import FrozenBase
from loracle.model.layers.four_bit import PackedWeight, four_bit_config, weight_of

# How PEFT tells a layer that it wraps from the layer's weight.
_WRAPPED, _ADAPTERS = ".base_layer.", ".lora_"


def stock_over(base: FrozenBase, *, folder: Path) -> PreTrainedModel:
    """Returns the stock model of ``folder``'s configuration; its tensors are those of ``base``.

    It must not be modified, and its gradients are off.

    Raises:
        ModelError: If the stock model has a tensor that the base has not.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # Weights need no memory; what is computed from the configuration is computed.
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
    if base.quantization:
        _pack_as(base, model)
    _lend(base, model)
    return model.eval()


def _pack_as(base: FrozenBase, model: PreTrainedModel) -> None:
    """Replaces the linear layers that the base has in 4 bits by bitsandbytes' own."""
    from transformers.integrations import replace_with_bnb_linear

    whole = [
        name.removesuffix(".base_layer")
        for name, layer in base.model.named_modules()
        if isinstance(layer, nn.Linear)
        and _ADAPTERS not in name
        and not isinstance(weight_of(layer), PackedWeight)
    ]
    config = four_bit_config(base.dtype)
    replace_with_bnb_linear(model, modules_to_not_convert=whole, quantization_config=config)
    model.is_loaded_in_4bit = True


def _lend(base: FrozenBase, model: PreTrainedModel) -> None:
    """Puts the base's tensors into the stock modules of the same names."""
    lent = _without_adapters(base)
    kept = model.state_dict().keys()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if name not in lent or _num_rows(lent[name]) != _num_rows(parameter):
            raise ModelError(f"{type(model).__name__}: the base has no {name} like the stock one")
        model.get_submodule(owner)._parameters[leaf] = _alias(lent[name])
    buffers = dict(base.model.named_buffers(remove_duplicate=False))
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        value = buffers[name] if name in kept and name in buffers else buffer.to(base.device)
        model.get_submodule(owner)._buffers[leaf] = value


def _without_adapters(base: FrozenBase) -> dict[str, nn.Parameter]:
    return {
        name.replace(_WRAPPED, "."): parameter
        for name, parameter in base.model.named_parameters(remove_duplicate=False)
        if _ADAPTERS not in name
    }


def _num_rows(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return int(packed.shape[0] if packed is not None else parameter.shape[0])


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Returns another parameter over the same memory; a packed one itself, with its scales."""
    if getattr(parameter, "quant_state", None) is not None:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)
