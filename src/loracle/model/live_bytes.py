"""Counts the bytes that tensors occupy while code runs, by purpose.

Works on real and on fake tensors: the outputs of every operation are tracked through their
storages, so that views count once, from their creation until the last reference is gone. Temporary
memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Watch = Callable[[Any, Sequence[Any], dict[str, Any], Any], None]
"""Called with an operator, its positional and keyword arguments, and its result."""


@dataclass
class _Block:
    part: Part
    num_bytes: int


class LiveBytes(TorchDispatchMode):
    """Tracks storages while it is entered.

    Args:
        granule: Bytes to whose multiples a block is rounded up, as an allocator does.
        watch: Called after every operation.
    """

    def __init__(self, *, granule: int = 1, watch: Watch | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._granule = granule
        self.watch = watch
        """Called after every operation; may be replaced while it is entered."""
        self._blocks: dict[int, _Block] = {}
        self._now: Counter[Part] = Counter()
        self._total = 0
        self.peak_bytes = 0
        """Highest number of live bytes since the last `forget_peak`."""
        self._at_peak: dict[Part, int] = {}

    @property
    def live_bytes(self) -> int:
        """Bytes that are live now."""
        return self._total

    @property
    def parts_at_peak(self) -> Mapping[Part, int]:
        """The peak by purpose; its values add up to ``peak_bytes``."""
        return {part: count for part, count in self._at_peak.items() if count}

    def forget_peak(self) -> None:
        """Resets the peak to the bytes that are live now."""
        self.peak_bytes = -1
        self._keep_peak()

    def hold(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Counts tensors under ``part``; those already tracked move there."""
        for tensor in tensors:
            self._follow(tensor, part)
            block = self._blocks[tensor.untyped_storage()._cdata]
            self._now[block.part] -= block.num_bytes
            self._now[part] += block.num_bytes
            block.part = part
        self._keep_peak()

    def hold_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Any]:
        """Counts parameters' gradients as soon as they exist; returns the hooks."""

        def hold_gradient(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.hold([parameter.grad], "gradients")

        return [p.register_post_accumulate_grad_hook(hold_gradient) for p in parameters]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._follow(result, part_now())
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._follow(leaf, part_now())
        if self.watch is not None:
            self.watch(func, args, kwargs, result)
        return result

    def _follow(self, tensor: Tensor, part: Part) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        num_bytes = -(-storage.nbytes() // self._granule) * self._granule
        self._blocks[key] = _Block(part, num_bytes)
        self._now[part] += num_bytes
        self._total += num_bytes
        self._keep_peak()
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._now[block.part] -= block.num_bytes
        self._total -= block.num_bytes

    def _keep_peak(self) -> None:
        if self._total > self.peak_bytes:
            self.peak_bytes = self._total
            self._at_peak = dict(self._now)


Part = Literal["weights", "adapters", "gradients", "optimizer", "activations", "head"]
_inside: list[Part] = []


@contextmanager
def computing(part: Part) -> Iterator[None]:
    """Counts allocations inside the context under ``part``."""
    _inside.append(part)
    try:
        yield
    finally:
        _inside.pop()


def part_now() -> Part:
    """Returns the part of the innermost context; activations outside of any."""
    return _inside[-1] if _inside else "activations"
