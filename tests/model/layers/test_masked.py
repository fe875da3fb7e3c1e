"""Compiled dropout has the bits of plain PyTorch, and nothing fails where it cannot be had."""

import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from loracle.forecast.op_costs import Operation, Work
from loracle.model.layers import compiled, lora, masked
from loracle.model.layers.dropout import DropoutStream, keep_bits, zero_dropped
from loracle.model.layers.fused import fused_product
from loracle.model.layers.lora import Route, routed_product
from loracle.model.layers.masked import Mask
from loracle.model.live_bytes import LiveBytes
from model.layers.test_stacked import DROPPING, WHOLE, outcome, stream
from tiny_engine import CPU, attach, tiny_base, tiny_plan

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
needs_compiler = pytest.mark.skipif(
    compiled.find_compiler() is None, reason="there is no C compiler here"
)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and a process that has no library yet."""
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    compiled._library.cache_clear()
    yield tmp_path / "cache" / "kernels"
    compiled._library.cache_clear()


streams_of_bundles = st.lists(
    st.builds(
        lambda threshold, seed, step, slots: DropoutStream(
            threshold, seed, step, tuple(slots), tuple(1 + slot % 7 for slot in slots)
        ),
        st.sampled_from([0, 1, 3277, 16384, 32767]),
        st.integers(0, 2**40),
        st.integers(0, 2**20),
        st.lists(st.integers(0, 1000), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=3,
).map(tuple)


@needs_compiler
@settings(max_examples=60)
@given(streams_of_bundles, st.integers(1, 600), st.sampled_from(DTYPES), st.text(max_size=9))
def test_in_one_pass_are_the_bits_of_plain_pytorch(streams, features, dtype, module):
    rows = sum(sum(each.lengths) for each in streams)
    draw = torch.Generator().manual_seed(features)
    x, update, out = (torch.randn(rows, features, generator=draw).to(dtype) for _ in range(3))
    x[0, 0], x[-1, -1] = torch.nan, -0.0
    mask = Mask(streams, module)
    assert masked.drops_in_one_pass(x)
    bits = keep_bits(streams, module=module, features=features, device=CPU)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(mask.drop(x).view(whole), zero_dropped(x, bits).view(whole))
    expected = out + zero_dropped(update, bits)
    mask.add_dropped(out, update)
    assert torch.equal(out.view(whole), expected.view(whole))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_side_by_side_are_taken_as_they_are(dtype):
    each = (stream(0.4, seed=2, lengths=(5, 4)),)
    wide = torch.randn(9, 40).to(dtype)
    bits = keep_bits(each, module="m", features=20, device=CPU)
    for x in (wide[:, 7:27], torch.randn(20, 9).to(dtype).T):
        assert torch.equal(Mask(each, "m").drop(x), zero_dropped(x.contiguous(), bits))
    out = wide.clone()
    Mask(each, "m").add_dropped(out[:, 3:23], wide[:, 7:27])
    expected = wide.clone()
    expected[:, 3:23] += zero_dropped(wide[:, 7:27].contiguous(), bits)
    assert torch.equal(out, expected)


@needs_compiler
def test_rounding_of_sums_in_bf16_is_pytorchs():
    """Every exponent, ties, overflow, infinities, subnormal numbers and zeros of both signs."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    out, update = every.view(64, 1024), every.view(64, 1024).roll(517, dims=1).flip(0)
    each = (replace(stream(0.1, seed=0, lengths=(64,)), threshold=0),)
    expected, got = out + update, out.clone()
    Mask(each, "m").add_dropped(got, update)
    is_number = ~expected.isnan()
    assert torch.equal(got[is_number].view(torch.int16), expected[is_number].view(torch.int16))
    assert got[~is_number].isnan().all()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    each = (stream(0.1, seed=5, lengths=(70, 31)),)
    x = torch.randn(101, 130)
    before = torch.get_num_threads()
    expected = zero_dropped(x, keep_bits(each, module="m", features=130, device=CPU))
    torch.set_num_threads(threads)
    try:
        assert torch.equal(Mask(each, "m").drop(x), expected)
    finally:
        torch.set_num_threads(before)


def test_the_switch_leaves_plain_pytorch(monkeypatch):
    monkeypatch.setenv(compiled.SWITCH, "plain")
    assert compiled.library() is None
    assert not masked.drops_in_one_pass(torch.ones(2, 2))


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_that_works_there_is_no_library(fresh, tmp_path, monkeypatch):
    failing = executable(tmp_path / "failing", "#!/bin/sh\necho no >&2; exit 1\n")
    lying = executable(tmp_path / "lying", "#!/bin/sh\nexit 0\n")
    for command in (failing, f"{lying} -m64"):
        monkeypatch.setenv("CC", command)
        compiled._library.cache_clear()
        assert compiled.library() is None
    each = (stream(0.1, seed=0, lengths=(4,)),)
    x = torch.ones(4, 6)
    assert torch.equal(
        Mask(each, "m").drop(x),
        zero_dropped(x, keep_bits(each, module="m", features=6, device=CPU)),
    )


def test_no_compiler_at_all_is_fine(fresh, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh.parent))
    assert compiled.find_compiler() is None
    monkeypatch.setenv("CC", "'not closed")
    assert compiled.find_compiler() is None
    assert compiled.library() is None


@needs_compiler
def test_the_compiled_file_is_kept_and_used_again(fresh, monkeypatch):
    assert compiled.library() is not None
    (kept,) = fresh.iterdir()
    compiled._library.cache_clear()
    monkeypatch.setattr(compiled, "_built", None)
    assert compiled.library() is not None
    assert list(fresh.iterdir()) == [kept]


@needs_compiler
def test_a_damaged_file_is_made_again(fresh):
    compiled.library()
    (kept,) = fresh.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # a new file: the old one is still mapped
    kept.write_bytes(b"not a library")
    compiled._library.cache_clear()
    assert compiled.library() is not None
    assert len(kept.read_bytes()) == len(whole)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_fine(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "below", "~nobody-here/cache"):
        monkeypatch.setenv("LORACLE_CACHE", str(place))
        compiled._library.cache_clear()
        assert compiled.library() is not None


@needs_compiler
def test_several_may_build_it_at_once(fresh):
    command, flags = compiled.find_compiler(), (*compiled._TRIES[-1], *compiled._FLAGS)
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(compiled._obtained(command, flags)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3
    assert all(map(compiled.is_exact, made))
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@needs_compiler
def test_a_library_with_other_bits_is_not_used(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "_SOURCE", compiled._SOURCE.replace("z >> 27", "z >> 26"))
    with pytest.warns(RuntimeWarning, match="differs from PyTorch's, and is not used"):
        assert compiled.library() is None


@needs_compiler
def test_another_compiler_source_or_processor_is_another_file(monkeypatch):
    command = compiled.find_compiler()
    keys = [compiled._key(command, flags) for flags in (("-O2",), ("-O3",))]
    keys.append(compiled._key([*command, "-m64"], ("-O2",)))
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    keys.append(compiled._key(command, ("-O2",)))
    monkeypatch.setattr(compiled, "_SOURCE", "another")
    keys.append(compiled._key(command, ("-O2",)))
    assert len(set(keys)) == 5


@needs_compiler
def test_a_trace_without_numbers_sees_one_pass():
    work = Work()
    with FakeTensorMode():
        x, out = torch.empty(8, 100), torch.empty(8, 100)
        drawn = torch.empty(8, dtype=torch.int64), torch.empty(8, dtype=torch.int16), 1
        with LiveBytes(watch=work.add):
            torch.ops.loracle.drop(x, *drawn)
            torch.ops.loracle.add_dropped(out, x, *drawn)
    drawn = 8 * (8 + 2)
    assert work.operations == {
        Operation(0, 2 * 3200 + drawn): 1,
        Operation(0, 3 * 3200 + drawn): 1,
    }


def test_flops_of_the_narrow_products_are_those_of_products():
    x, z, out = (torch.empty(8, n, device="meta") for n in (100, 4, 30))
    a, b = torch.empty(4, 100, device="meta"), torch.empty(30, 4, device="meta")
    work = Work()
    with LiveBytes(watch=work.add):
        assert masked.narrow(x, a).shape == (8, 4)
        masked.widen_(out, z, b.T)
        assert masked.outer(z, x).shape == (4, 100)
        assert masked.outer(z, out, by_feature=True).shape == (30, 4)
    flops = sorted(cost.flops for cost in work.operations.elements())
    assert flops == [2 * 8 * 4 * n for n in (30, 30, 100, 100)]


@pytest.fixture
def narrow_products():
    """Gives a CPU what only a CUDA device has: the narrow products, in plain PyTorch."""

    def masked(x, keys, thresholds, module):
        return x if keys is None else torch.ops.loracle.drop(x, keys, thresholds, module)

    def narrow(x, factor, keys, thresholds, module, scale, bounds):
        z = masked(x, keys, thresholds, module) @ factor.to(x.dtype).T
        z = z if scale is None else z * scale.to(z.dtype)
        if bounds is None:
            return z
        columns = torch.arange(len(factor))
        return z * ((columns >= bounds[:, :1]) & (columns < bounds[:, 1:]))

    def widen(out, z, factor, keys, thresholds, module, scale):
        factor = factor if scale is None else factor * scale[:, None]
        out += masked(z @ factor.to(z.dtype), keys, thresholds, module)

    def outer(z, y, keys, thresholds, module, scale, by_feature):
        made = z.T @ masked(y, keys, thresholds, module)
        made = made if scale is None else made * scale[:, None]
        return made.T.contiguous() if by_feature else made

    with torch.library._scoped_library("loracle", "IMPL") as library:
        for product in (narrow, widen, outer):
            library.impl(product.__name__, product, "CPU")
        yield


ALONE = (Route("a", 3, None, stream(0.5, seed=0, lengths=(9, 11))),)


@needs_compiler
@pytest.mark.parametrize("routes", [DROPPING, WHOLE, ALONE, WHOLE[:1]])
def test_one_kernel_a_product_is_the_routed_product(narrow_products, routes):
    got, expected = (outcome(product, routes) for product in (fused_product, routed_product))
    for candidate, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(candidate, reference, rtol=1e-6, atol=1e-6)


@needs_compiler
def test_a_layer_takes_the_kernels_where_there_are_some(narrow_products, monkeypatch):
    monkeypatch.setattr(masked, "multiplies_in_one_pass", lambda x, *, rank: rank <= 8)
    base = tiny_base()
    attach(base, tiny_plan())
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(9, 32, requires_grad=True)
    calls = []
    product = lora.fused_product
    monkeypatch.setattr(lora, "fused_product", lambda *given: calls.append(1) or product(*given))
    with base.router.following((Route("default", 2, 5),)):
        out = layer(x)
    with base.router.following(()):
        layer(x)
    assert calls == [1]
    monkeypatch.undo()
    with base.router.following((Route("default", 2, 5),)):
        torch.testing.assert_close(out, layer(x))
