"""Scores the linear layers on a few training batches of the frozen base, to choose where to adapt.

The base is not modified: hooks observe its layers during forward and backward passes over the
packed rows and the loss of training.

``gradient-energy``: ||dL/dB||^2 of an adapter at its start (B = 0, A as its run would draw it),
that is ||G^T X A^T||^2, averaged over batches, per adapter parameter. A gradient step lowers the
loss by the rate times this, to first order; A has no gradient yet. alpha / r scales all layers
alike and is left out, as is dropout, which adds noise. PAGE measures projected adapter gradient
energy at the start (Zhang et al. 2026 arXiv:2605.06183, read in abstract only); LoRA-GA initialises
from first gradients (Wang, Yu, Li 2024 arXiv:2407.05000). Our change: division by r (I + O), so
that layers of different size compare.

``feature-norm``: 1 / NFN, as PLoP adapts the layers whose NFN is lowest: the norm of W x for the
task's inputs relative to random inputs of the same norm (Hayou, Ghosh, Yu 2025 arXiv:2506.20629).
Our changes: the random norm is its root mean square, ||x|| ||W||_F / sqrt(I), instead of a draw;
each layer has its own score, where PLoP averages over the layers of a kind. Needs no gradient, no
seed.

``weight-gradient``: sum of |W * dL/dW|, averaged over target tokens, per adapter parameter, SNIP's
pruning criterion (Lee, Ajanthan, Torr 2019 arXiv:1810.02340). Our change: absolute values are taken
example by example instead of batch by batch, so that no gradient of W is ever stored.

Shapes: T tokens that a layer sees in a row, I input and O output features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from loracle.data import Example
from loracle.data.packing import PackedRow, batches_by_tokens, pack
from loracle.errors import ModelError, NonFiniteError, PlacementError, did_you_mean
from loracle.model.adapters import initial_a
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.model.layers.four_bit import weight_of, whole
from loracle.model.layers.head import as_float
from loracle.placement import LinearModule, Score
from loracle.placement.presets import all_linear

Watcher = Callable[[LinearModule, Tensor, Tensor], None]


def score_modules(
    base: FrozenBase,
    examples: Sequence[Example],
    *,
    score: str,
    seed: int,
    rank: int = 16,
    batch_size: int = 8,
    micro_batch_tokens: int,
) -> dict[str, float]:
    """Returns the score of every linear layer except the head, by full name; larger: adapt.

    Args:
        base: The frozen model, without adapters; it is not modified.
        examples: Training examples only: held-out ones would leak into the placement.
        score: One of `loracle.placement.SCORES`.
        seed: Seed of the streams from which A is drawn, as in a run.
        rank: Rank of the adapters whose gradient is measured; a larger one has less noise.
        batch_size: Examples per batch over which a gradient is averaged, as in a training step.
        micro_batch_tokens: Tokens per forward pass; changes memory and rounding, nothing else.

    Raises:
        PlacementError: If there is no such score.
        ModelError: If the base has adapters, or the score of a layer is undefined.
        NonFiniteError: If a score is NaN or infinite.
    """
    if score not in get_args(Score):
        names = ", ".join(get_args(Score))
        hint = did_you_mean(score, get_args(Score))
        raise PlacementError(f"score '{score}': there is no such score (there are {names}){hint}")
    assert examples, "a score needs examples"
    work = _Work(base, all_linear(inventory_of(base.model)), micro_batch_tokens)
    if score == "feature-norm":
        scores = _feature_norms(work, examples)
    elif score == "weight-gradient":
        scores = _weight_gradients(work, examples)
    else:
        scores = _gradient_energies(work, examples, batch_size=batch_size, rank=rank, seed=seed)
    for name, value in scores.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"score '{score}' of {name} is {value}; use dtype float32 or bfloat16"
            )
    return scores


@dataclass(frozen=True)
class _Work:
    """The scored modules and the size of a forward pass."""

    base: FrozenBase
    modules: Sequence[LinearModule]
    micro_batch_tokens: int

    def rows(self, examples: Sequence[Example]) -> Iterator[PackedRow]:
        """Yields the examples in packed rows of at most ``micro_batch_tokens``."""
        lengths = [example.num_tokens for example in examples]
        for part in batches_by_tokens(lengths, budget=self.micro_batch_tokens):
            yield pack(examples[part.start : part.stop], device=self.base.device)

    def weight(self, module: LinearModule) -> Float[Tensor, "O I"]:
        """Returns the frozen weight of a layer, in fp32 or wider."""
        stored = weight_of(self.base.model.get_submodule(module.name))
        return as_float(whole(stored, self.base.dtype).detach())

    def zeros(self) -> dict[str, Tensor]:
        """Returns a zero sum for every layer."""
        start = torch.zeros((), dtype=torch.float64, device=self.base.device)
        return {module.name: start for module in self.modules}


def _gradient_energies(
    work: _Work, examples: Sequence[Example], *, batch_size: int, rank: int, seed: int
) -> dict[str, float]:
    projections = {
        module.name: initial_a(module.name, rank=rank, features=module.in_features, seed=seed).to(
            work.base.device
        )
        for module in work.modules
    }
    energies = work.zeros()
    starts = range(0, len(examples), batch_size)
    for start in starts:
        batch = examples[start : start + batch_size]
        num_targets = sum(example.num_targets for example in batch)
        for name, grad_b in _gradients_of_b(work, batch, projections=projections).items():
            energies[name] = energies[name] + (grad_b / num_targets).double().square().sum()
    measured = _on_host(energies)
    return {
        module.name: measured[module.name]
        / (len(starts) * rank * (module.in_features + module.out_features))
        for module in work.modules
    }


def _gradients_of_b(
    work: _Work, batch: Sequence[Example], *, projections: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the gradient of the batch's summed loss by B (O, r), where there is one."""
    gradients: dict[str, Tensor] = {}

    def see(module: LinearModule, x: Tensor, grad: Tensor) -> None:
        wide = as_float(x)
        narrow = wide @ projections[module.name].to(wide.dtype).T
        grad_b = as_float(grad).T @ narrow
        earlier = gradients.get(module.name)
        gradients[module.name] = grad_b if earlier is None else earlier + grad_b

    for row in work.rows(batch):
        _backward(work, row, see=see)
    return gradients


def _weight_gradients(work: _Work, examples: Sequence[Example]) -> dict[str, float]:
    sums = work.zeros()

    def see(lengths: Sequence[int], module: LinearModule, x: Tensor, grad: Tensor) -> None:
        if len(x) != sum(lengths):
            raise ModelError(
                f"score 'weight-gradient': {module.name} does not read whole sequences, so its "
                "gradient cannot be had example by example; use another score"
            )
        weight = work.weight(module)
        for inputs, grads in zip(x.split([*lengths]), grad.split([*lengths]), strict=True):
            product = (as_float(grads).T @ as_float(inputs)).mul_(weight)
            sums[module.name] = sums[module.name] + product.abs_().sum().double()

    for row in work.rows(examples):
        _backward(work, row, see=partial(see, row.lengths))
    num_targets = sum(example.num_targets for example in examples)
    measured = _on_host(sums)
    return {
        module.name: measured[module.name]
        / (num_targets * (module.in_features + module.out_features))
        for module in work.modules
    }


def _feature_norms(work: _Work, examples: Sequence[Example]) -> dict[str, float]:
    sums, counts = work.zeros(), work.zeros()
    random = {
        module.name: work.weight(module).norm() / math.sqrt(module.in_features)
        for module in work.modules
    }

    def see(module: LinearModule, x: Tensor, out: Tensor) -> None:
        out = as_float(out).reshape(-1, out.shape[-1])
        layer: Any = work.base.model.get_submodule(module.name)
        bias = getattr(layer, "bias", None)
        features = out if bias is None else out - as_float(bias)
        expected = as_float(x).norm(dim=1) * random[module.name]
        ratios = features.norm(dim=1) / expected
        # The ratio is undefined for an input of zeros. Choosing rows would wait for a GPU.
        defined = expected != 0
        ratios = torch.where(defined, ratios, torch.zeros_like(ratios))
        sums[module.name] = sums[module.name] + ratios.double().sum()
        counts[module.name] = counts[module.name] + defined.sum()

    with torch.no_grad(), _watching(work, see):
        for row in work.rows(examples):
            work.base.token_nll(row, routes=())
    seen = _on_host(counts)
    for name, count in seen.items():
        if not count:
            raise ModelError(f"score 'feature-norm': {name} is never computed, so it has none")
    return _on_host({name: counts[name] / sums[name] for name in sums})


def _on_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Returns the values of all layers, copied together, because each copy waits for a GPU."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _backward(work: _Work, row: PackedRow, *, see: Watcher) -> None:
    """Calls ``see`` with the input and the output gradient of each layer for the row's summed loss.

    A sum rather than a mean, because in fp16 a mean's gradients would underflow.
    """

    def watch(module: LinearModule, x: Tensor, out: Tensor) -> None:
        # Layers that read the embeddings of a frozen model would have no gradient otherwise.
        out.requires_grad_()
        out.register_hook(lambda grad: see(module, x, grad.reshape(-1, grad.shape[-1])))

    with torch.enable_grad(), _watching(work, watch):
        work.base.token_nll(row, routes=()).sum().backward()


@contextmanager
def _watching(work: _Work, watch: Watcher) -> Iterator[None]:
    """Calls ``watch`` with each layer's input, as (T, I), and output whenever it is computed."""

    def hook(module: LinearModule, _layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach()
        watch(module, x.reshape(-1, x.shape[-1]), out)

    handles = [
        work.base.model.get_submodule(module.name).register_forward_hook(partial(hook, module))
        for module in work.modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
