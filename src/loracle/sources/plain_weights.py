"""Which model folders hold plain weights: not packed in advance, not an adapter's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loracle.errors import SourceError
from loracle.records.files import read_json

# source: transformers@v5.23 quantizers/auto.py, compressed-tensors, and mlx_lm's converter
_PACKED_KEYS = ("quantization_config", "compression_config", "quantization")


def require_plain_folder(folder: Path, *, name: str) -> None:
    """Checks that ``folder`` holds the weights of a model as they were trained.

    Raises:
        SourceError: If they are quantised, or Transformers would load another model in its place.
    """
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"{name}: holds an adapter (adapter_config.json), in whose place its base would be "
            "loaded; name a model's own folder"
        )
    config = folder / "config.json"
    if config.is_file():
        tree = read_json(config, origin=f"{name}/config.json", fault=SourceError)
        require_plain_weights(tree, name=name)


def require_plain_weights(architecture: Mapping[str, Any], *, name: str) -> None:
    """Checks that a configuration speaks of weights that are not quantised.

    Raises:
        SourceError: Naming the method.
    """
    for scheme in _schemes(architecture):
        method = scheme.get("quant_method") or scheme.get("quant_type") or scheme.get("mode")
        bits = scheme.get("bits") or scheme.get("w_bit")
        said = ", ".join(
            part for part in (str(method or "by a method it does not name"), _bits(bits)) if part
        )
        raise SourceError(
            f"{name}: its weights are already quantised ({said}), which cannot be trained on here; "
            "name the model that they were made from (quantization=nf4 packs that on loading)"
        )


def _bits(bits: object) -> str:
    return f"{bits} bits" if isinstance(bits, int) else ""


def _schemes(architecture: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields what a configuration, or a part of it, says about quantised weights."""
    parts = [architecture, *(part for part in architecture.values() if isinstance(part, Mapping))]
    for part in parts:
        for key in _PACKED_KEYS:
            if isinstance(scheme := part.get(key), Mapping) and scheme:
                yield scheme
