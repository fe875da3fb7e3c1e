"""What a file of weights and a model do not have in common, in one line.

Transformers fills a tensor that it did not find with random numbers, passes over one that it has no
place for, and says both in a warning only. Here either ends the load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# assumed: enough names to see what is wrong; the number of all is given beside them
_NAMED = 3


def misfits(model: Any, report: Mapping[str, Any]) -> str | None:
    """Returns which tensors of a loaded model are not the file's, and the reverse; None if none.

    Harmless ones are decided by rule. Transformers leaves out of its report what is tied to a
    tensor that was found and what the class itself says may be missing or left over. A stored
    tensor that is named like a buffer, such as a mask, is computed and never learned.

    Args:
        model: The loaded ``PreTrainedModel``.
        report: What ``from_pretrained`` returns with ``output_loading_info``, sizes ignored.
    """
    computed = {name for name, _ in model.named_buffers()}
    resized = sorted(report["mismatched_keys"])
    missing = set(report["missing_keys"]) - {name for name, *_ in resized}
    faults = [
        _counted(missing, "the model needs {} and the file has not"),
        _counted(set(report["unexpected_keys"]) - computed, "the model has no place for {}"),
        _counted(
            (f"{name}: {_size(stored)}, not {_size(wanted)}" for name, stored, wanted in resized),
            "{} of another size than config.json says",
        ),
        _counted(_untied(model), "config.json ties {} and the file has other values for"),
        _counted(map(str, report.get("error_msgs", ())), "{} could not be read"),
    ]
    return "; ".join(fault for fault in faults if fault) or None


def _counted(names: Iterable[str], phrase: str) -> str | None:
    """Returns ``phrase`` around the number of names, and the first of them."""
    found = sorted(names)
    if not found:
        return None
    rest = ", ..." if len(found) > _NAMED else ""
    tensors = f"{len(found)} tensor{'s' if len(found) > 1 else ''}"
    return f"{phrase.format(tensors)} ({', '.join(found[:_NAMED])}{rest})"


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _untied(model: Any) -> set[str]:
    """Returns the tensors that the configuration ties and that Transformers left untied."""
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    return set(wanted) - set(model.all_tied_weights_keys)
