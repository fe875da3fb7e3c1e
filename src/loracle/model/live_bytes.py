"""Bytes that tensors occupy while code runs, by what they are for.

Works on real tensors and on fake ones alike: the outputs of every operation are followed through
their storages, so that views count once, from the operation that makes them until the last
reference is gone. What a kernel takes for itself and gives back before it returns is not seen.
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
"""Takes an operator, its arguments, those by name, and what it returned."""


@dataclass
class _Block:
    part: Part
    num_bytes: int


class LiveBytes(TorchDispatchMode):
    """Follows storages while it is entered.

    Args:
        granule: Bytes to whose multiples a block is rounded up, as an allocator does.
        watch: Sees every operation; None: nobody does.
    """

    def __init__(self, *, granule: int = 1, watch: Watch | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._granule = granule
        self.watch = watch
        """Sees every operation; may be changed while it is entered."""
        self._blocks: dict[int, _Block] = {}
        self._now: Counter[Part] = Counter()
        self._total = 0
        self.peak_bytes = 0
        """The most that was live at once, since the last `forget_peak`."""
        self._at_peak: dict[Part, int] = {}

    @property
    def live_bytes(self) -> int:
        """What is live now."""
        return self._total

    @property
    def parts_at_peak(self) -> Mapping[Part, int]:
        """The peak by what it was for; its values add up to ``peak_bytes``."""
        return {part: count for part, count in self._at_peak.items() if count}

    def forget_peak(self) -> None:
        """Begins a new peak with what is live now."""
        self.peak_bytes = -1
        self._keep_peak()

    def hold(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Counts tensors under ``part``, those that are known already instead of as before."""
        for tensor in tensors:
            self._follow(tensor, part)
            block = self._blocks[tensor.untyped_storage()._cdata]
            self._now[block.part] -= block.num_bytes
            self._now[part] += block.num_bytes
            block.part = part
        self._keep_peak()

    def hold_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Any]:
        """Counts the gradient of each parameter as one from when it is there; returns the hooks."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.hold([parameter.grad], "gradients")

        return [each.register_post_accumulate_grad_hook(arrived) for each in parameters]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if isinstance(found, Tensor):
            self._follow(found, part_now())
        else:
            for leaf in tree_leaves(found):
                if isinstance(leaf, Tensor):
                    self._follow(leaf, part_now())
        if self.watch is not None:
            self.watch(func, args, kwargs, found)
        return found

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
        weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
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
    """Says that what is allocated inside the block belongs to ``part``."""
    _inside.append(part)
    try:
        yield
    finally:
        _inside.pop()


def part_now() -> Part:
    """Returns the part of the innermost block; outside of all, activations."""
    return _inside[-1] if _inside else "activations"
