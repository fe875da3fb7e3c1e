"""Triton's kernels of dropout and adapters, run by Triton's interpreter on a CPU.

``test_dropout_kernels`` runs this file in a process whose environment makes Triton interpret.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.model.layers import adapter_kernels as kernels
from loracle.model.layers import adapter_ops
from loracle.model.layers import masked as callers
from loracle.model.layers.dropout import DropoutStream, keep_bits, threshold_of, zero_dropped
from loracle.model.layers.fused import fused_product
from loracle.model.layers.lora import Route, routed_product
from loracle.model.layers.masked import Mask, narrow, outer, widen_

CPU = torch.device("cpu")
# Of products of as many terms as there are here, against fp64 with the same rounded factors.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    """Registers the kernels as the operators of a CPU."""
    assert hasattr(kernels._drop, "rewrite"), "TRITON_INTERPRET=1 is not set"
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.library._scoped_library("loracle", "IMPL") as library,
    ):
        compute_in_bf16(patch)
        for name in ("narrow", "widen", "outer"):
            library.impl(name, getattr(adapter_ops, f"_{name}_on_cuda"), "CPU")
        yield


def compute_in_bf16(patch):
    """The interpreter multiplies the integers that hold bf16, and rounds to bf16 towards zero."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (float32, bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view("uint16"), bfloat16)

    def create_dot(self, a, b, *rest):
        a, b = (
            cast(self, handle, float32) if handle.dtype.scalar == bfloat16 else handle
            for handle in (a, b)
        )
        return dot(self, a, b, *rest)

    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_dot", create_dot)


def stream(p: float, *lengths: int, seed: int = 0) -> DropoutStream:
    return DropoutStream(threshold_of(p), seed, 3, tuple(range(len(lengths))), lengths)


STREAMS = (stream(0.1, 20, 10), stream(0.5, 7, seed=1))


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return bool(error <= TOLERANCES[dtype])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(1, 600),
    st.sampled_from([0, 1, 3277, 32767]),
    st.integers(0, 2**40),
    st.sampled_from(list(TOLERANCES)),
    st.booleans(),
)
def test_dropped_numbers_have_the_bits_of_plain_pytorch(
    lengths, features, threshold, seed, dtype, adds
):
    each = (DropoutStream(threshold, seed, 2, tuple(range(len(lengths))), tuple(lengths)),)
    x, out = (torch.randn(sum(lengths), features).to(dtype) for _ in range(2))
    masked = zero_dropped(x, keep_bits(each, module="m", features=features, device=CPU))
    expected = out + masked if adds else masked
    kernels.drop(x, kernels.Drawn(*Mask(each, "m").drawn(CPU)), out=out, adds=adds)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rank", [1, 16, 40, 200])
@pytest.mark.parametrize("features", [1, 45, 301])
def test_products_are_those_of_fp64(dtype, rank, features):
    rows = 37
    x, z, y = (torch.randn(rows, n).to(dtype) for n in (features, rank, features))
    factor, scale = torch.randn(rank, features), torch.rand(rank) + 1
    mask, kept = Mask(STREAMS, "m"), keep_bits(STREAMS, module="m", features=features, device=CPU)
    masked = zero_dropped(x, kept).double()
    half = factor.to(dtype).double()
    assert close(narrow(x, factor, mask=mask, scale=scale), masked @ half.T * scale, dtype)
    bounds = torch.tensor([[0, rank // 2]] * 30 + [[rank // 2, rank]] * 7, dtype=torch.int32)
    own = (torch.arange(rank) >= bounds[:, :1]) & (torch.arange(rank) < bounds[:, 1:])
    expected = x.double() @ half.T * own
    got = narrow(x, factor.T.contiguous().T, bounds=bounds)
    assert not got[~own].any()
    assert rank == 1 or close(got, expected, dtype)
    out = y.clone()
    widen_(out, z, factor, mask=mask, scale=scale)
    scaled = (factor * scale[:, None]).to(dtype).double()
    assert close(out, y.double() + z.double() @ scaled * kept.bool(), dtype)
    for by_feature in (False, True):
        got = outer(z, x, mask=mask, scale=scale, by_feature=by_feature)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        got = got.T if by_feature else got
        assert close(got, z.double().T @ masked * scale[:, None], torch.float32)


def test_tokens_divided_between_programs_add_up(monkeypatch):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda _: 64)
    z, y = torch.randn(700, 2), torch.randn(700, 45)
    assert kernels.num_parts(700, 2, tiles=1, wanted=128) == 5
    for by_feature in (False, True):
        got = outer(z, y, by_feature=by_feature)
        assert close(got, y.T @ z if by_feature else z.T @ y, torch.float32)


ROUTES = (
    Route("a", 2, 9, stream(0.5, 3, 4)),
    Route("b", 9, 14, None),
    Route("c", 17, None, stream(0.1, 6, seed=1)),  # tokens 14 to 16 belong to nobody
)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("routes", [ROUTES, ROUTES[:1]], ids=["three runs", "one run"])
def test_output_and_gradients_are_those_of_run_by_run(routes, dtype):
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=draw)

    x, weight = drawn(23, 37).to(dtype), drawn(29, 37).to(dtype)
    factors = [f for rank in (2, 4, 1) for f in (drawn(rank, 37), drawn(29, rank))]
    factors = factors[: 2 * len(routes)]
    leaves = [tensor.requires_grad_() for tensor in (x, *factors)]
    grad = drawn(23, 29).to(dtype)
    results = []
    for product in (fused_product, routed_product):
        out = product(x, weight, None, "m", routes, (2.0, 0.5, 1.0)[: len(routes)], *factors)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert close(got, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("features", [512, 509])
def test_kernels_that_are_right_pass_their_check(dtype, rank, features):
    assert callers._fault(CPU, dtype, rank=rank, features=features) is None


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("narrow", lambda made: made * 1.2, "differ in the product with A"),
        ("outer", lambda made: made.roll(1, dims=0), "differ in the product with gradient"),
    ],
)
def test_a_wrong_kernel_is_found_and_not_used(name, wrong, told, monkeypatch):
    real = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args, **given: wrong(real(*args, **given)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.warns(RuntimeWarning, match=f"are not used, PyTorch's are; ours {told}"):
        assert not callers._is_right.__wrapped__(CPU, torch.float16, rank=16, is_aligned=False)


def test_a_kernel_that_cannot_be_built_is_not_used(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(kernels, "narrow", fails)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.warns(RuntimeWarning, match="cannot be built: Failed to find C compiler"):
        assert not callers._is_right.__wrapped__(CPU, torch.float16, rank=16, is_aligned=True)
