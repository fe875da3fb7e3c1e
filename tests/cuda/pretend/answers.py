"""What Python asks of a pretended card: made-up numbers, counts, and the waits of the host.

``install`` (done by site/sitecustomize.py once torch is imported) answers ``item``, ``tolist``,
``bool`` and comparisons of CUDA tensors, whose contents no kernel has computed: a test holds, two
tensors are equal, a gap between two losses is 0, any other float is 1, an integer stays small.
"""

from __future__ import annotations

import collections
import ctypes
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COUNTERS = (
    "kernels", "products", "graphs", "in_graphs", "waits", "to_device", "to_host", "on_device",
    "pageable", "fills", "allocations", "frees", "refused",
)  # fmt: skip
_LARGEST_INTEGER = 31  # a token id that each tokenizer of the tests has
_OWN = str(Path(__file__).parent)
_CARD = ctypes.CDLL(None)
_WAIT = ctypes.CFUNCTYPE(None)
waits: collections.Counter[str] = collections.Counter()
"""Waits of the host, by the line of ours that caused them."""


def install() -> None:
    """Answers what is asked of CUDA tensors; writes down each wait of the host."""
    import torch  # not above: a script may import this module first

    _CARD.pretend_flop.restype = ctypes.c_double
    _CARD.pretend_count.restype = ctypes.c_long
    _CARD.pretend_in_use.restype = _CARD.pretend_peak.restype = ctypes.c_size_t
    _CARD.pretend_next_kernel.argtypes = [
        ctypes.c_long,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.POINTER(ctypes.c_long),
    ]
    _CARD.pretend_next_kernel.restype = ctypes.c_long
    for name, answer in _ANSWERS.items():
        setattr(torch.Tensor, name, _answered(getattr(torch.Tensor, name), answer))
    for name in ("equal", "allclose"):
        setattr(torch, name, _compared(getattr(torch, name)))
    _CARD.pretend_tell_waits(_note_wait)


# ---- made-up numbers ----


def _answered(real: Callable[..., Any], answer: Callable[[Any], Any]) -> Callable[..., Any]:
    def ask(self: torch.Tensor, *more: Any) -> Any:
        found = real(self, *more)  # the real call, so that the wait and its errors are real
        return answer(found) if self.is_cuda else found

    return ask


def _item(found: Any) -> Any:
    if not isinstance(found, float):
        return _made_up(found)
    line = _line_of(_ours(sys._getframe(2)))
    return 0.0 if any(word in line for word in ("gap", "leak", "difference", "abs()")) else 1.0


def _made_up(found: Any) -> Any:
    if isinstance(found, list):
        return [_made_up(each) for each in found]
    if isinstance(found, bool):
        return True
    return 1.0 if isinstance(found, float) else min(max(found, 0), _LARGEST_INTEGER)


_ANSWERS: dict[str, Callable[[Any], Any]] = {
    "item": _item,
    "tolist": _made_up,
    "__bool__": lambda _: True,
    "__float__": lambda _: 1.0,
    "__int__": lambda found: min(max(found, 0), _LARGEST_INTEGER),
}


def _compared(real: Callable[..., bool]) -> Callable[..., bool]:
    def compare(a: torch.Tensor, b: torch.Tensor, *more: Any, **named: Any) -> bool:
        found = real(a, b, *more, **named)  # tensors of two devices fail here, as they should
        return found or (a.is_cuda and a.shape == b.shape)

    return compare


# ---- counts ----


def counts() -> dict[str, float]:
    """Returns what was asked since the last ``forget``; a graph is one of the ``launches``."""
    found: dict[str, float] = {
        name: _CARD.pretend_count(place) for place, name in enumerate(COUNTERS)
    }
    found["launches"] = found["kernels"] + found["products"] + found["graphs"]
    return found | {"flop": _CARD.pretend_flop(), "card_peak_bytes": _CARD.pretend_peak()}


def kernels() -> dict[str, int]:
    """Returns launches by the kernel's name, Triton's by its function's, since ``forget``."""
    found: collections.Counter[str] = collections.Counter()
    name, launched, place = ctypes.c_char_p(), ctypes.c_long(), 0
    while (
        place := _CARD.pretend_next_kernel(place, ctypes.byref(name), ctypes.byref(launched))
    ) >= 0:
        found[(name.value or b"?").decode()] += launched.value
    return dict(found.most_common())


def forget() -> None:
    """Starts all counts anew."""
    _CARD.pretend_forget_counts()
    _CARD.pretend_forget_flop()
    _CARD.pretend_forget_kernels()
    waits.clear()


# ---- waits ----


def _ours(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of loracle on the stack; of another's where there is none."""
    outermost = frame
    while frame is not None:
        if "/loracle/" in frame.f_code.co_filename and not frame.f_code.co_filename.startswith(
            _OWN
        ):
            return frame
        frame, outermost = frame.f_back, frame
    return None if outermost is None else outermost


def _line_of(frame: FrameType | None) -> str:
    return (
        "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    )


@_WAIT
def _note_wait() -> None:
    frame = _ours(sys._getframe(1) if _has_caller() else None)
    if frame is None:
        waits["no Python line"] += 1
        return
    short = frame.f_code.co_filename.split("/loracle/")[-1]
    waits[f"{short}:{frame.f_lineno} {_line_of(frame)}"] += 1


def _has_caller() -> bool:
    try:
        sys._getframe(2)
    except ValueError:
        return False
    return True
