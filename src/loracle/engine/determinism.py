"""Whether a run that is repeated ends with the same bits, and the switches that make it so.

On a CPU it does, without a switch. On a GPU the attention kernels' backward pass adds in the order
in which blocks finish, and cuBLAS may share its workspace between streams.

``null`` in the configuration chooses the same bits on a GPU too, by their price. Attention's
backward pass is up to 38 % slower (source: Qiang et al. 2026 arXiv:2601.21824, FlashAttention-3 on
an H800), and attention is 1 % of the products of LLaMA-2-7B at 512 tokens: 4.2 of 409 MFLOP a token
and layer. Assumed: nothing else costs time that shows; there is no GPU here to measure it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loracle.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# source: NVIDIA cuBLAS documentation, section Results Reproducibility
_REPEATABLE = (":4096:8", ":16:8")


@contextmanager
def determinism(device: torch.device, *, requested: bool | None) -> Iterator[bool]:
    """Makes operations inside the block repeat their bits where that is wanted.

    Args:
        device: The run's device.
        requested: ``deterministic`` of the configuration; None chooses.

    Yields:
        Whether they do.

    Raises:
        ConfigError: If it is requested and was made impossible before.
    """
    if device.type == "cpu":
        yield True
        return
    before = _settings()
    try:
        works = requested is not False and _switched_on(device)
        if requested and not works:
            raise ConfigError(
                f"deterministic: needs {_WORKSPACE}={_REPEATABLE[0]} in the environment before "
                "CUDA starts; set it, or deterministic=false"
            )
        if not works:
            _apply(before)
        yield works
    finally:
        _apply(before)


def _switched_on(device: torch.device) -> bool:
    """Switches to operations that repeat; False if cuBLAS was told otherwise, or told too late."""
    if os.environ.setdefault(_WORKSPACE, _REPEATABLE[0]) not in _REPEATABLE:
        return False
    _apply((True, False, True, False))
    return _products_run(device)


def _products_run(device: torch.device) -> bool:
    """Returns False if PyTorch refuses products, as some releases do without the variable."""
    square = torch.ones(16, 16, device=device)
    try:
        square @ square
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return False
    return True


def _settings() -> tuple[bool, bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        # Only code that reads memory which nobody wrote needs it filled; it costs a kernel each.
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def _apply(settings: tuple[bool, bool, bool, bool]) -> None:
    algorithms, fill, cudnn, benchmark = settings
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = cudnn
    torch.backends.cudnn.benchmark = benchmark
