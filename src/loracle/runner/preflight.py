"""Checks before a model is fetched: whether it could be used, and this machine hold it, at all."""

from __future__ import annotations

from loracle.config.bleu import lacks
from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.sources import model_architecture
from loracle.sources.catalog import source_of
from loracle.sources.plain_weights import require_plain_weights
from loracle.sources.spec import HubSource, parse_source
from loracle.text import GIB


def preflight(config: Config) -> None:
    """Checks BLEU's tokenizer, and a hub model before it is fetched.

    Its weights must be plain and fit, its architecture keep the sequences of a row apart. Whether a
    step fits is what `loracle plan` says; this is the least that a run needs. Access, revision and
    disk are checked where the model is looked up.

    Raises:
        UsageError: If the tokenizer is not here, the weights do not fit the device or are
            quantised, rows leak, or the model cannot be had.
    """
    asked = config.eval.bleu_tokenize
    missing = lacks(asked) if config.eval.generate_examples and asked != "auto" else None
    if missing is not None:
        raise UsageError(f"eval.bleu_tokenize: '{asked}' {missing}")
    if not isinstance(parse_source(source_of(config.model, kind="model")), HubSource):
        return
    architecture = model_architecture(config.model)
    require_plain_weights(architecture, name=config.model)
    from loracle.forecast.devices import this_device
    from loracle.forecast.fit import profile_of
    from loracle.forecast.predict import dtype_on
    from loracle.model.guard import require_sealed_architecture

    require_sealed_architecture(architecture)
    device = this_device()
    dtype = dtype_on(device, requested=config.dtype)
    packed = config.quantization is not None
    need = weights_gib(config.model, bytes_each=dtype.itemsize, packed=packed)
    if need <= device.memory_gib:
        return
    can_pack = device.is_gpu and not packed
    hint = "quantization=nf4 takes a quarter of that" if can_pack else "choose a smaller model"
    if profile_of(config.model, device):
        hint = "--fit takes the settings that are known to fit"
    raise UsageError(
        f"{config.model}: its weights take {need:.1f} GiB in "
        f"{'4 bits' if packed else str(dtype).removeprefix('torch.')} and {device.name} has "
        f"{device.memory_gib:.1f} GiB; {hint} (`loracle plan` shows what each setting needs)"
    )


def weights_gib(model: str, *, bytes_each: int, packed: bool) -> float:
    """Returns the memory of a model's weights, ``bytes_each`` wide.

    Packed are linear layers but the head: in 4 bits, with a byte for every 64 weights.

    Raises:
        UsageError: If its architecture cannot be had.
    """
    from loracle.model.inventory import inventory_from_architecture

    inventory = inventory_from_architecture(model_architecture(model))
    linear = sum(
        module.in_features * module.out_features
        for module in inventory.modules
        if module.role != "head"
    )
    dense = inventory.total_params - (linear if packed else 0)
    return (dense * bytes_each + (linear * (0.5 + 1 / 64) if packed else 0)) / GIB
