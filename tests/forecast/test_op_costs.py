"""The arithmetic of operations is their closed form, and views and allocations cost nothing."""

import importlib
import pkgutil
from contextlib import suppress

import pytest
import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from geometries import TINY
from loracle.config.files import load_config
from loracle.forecast.devices import DEVICES
from loracle.forecast.meta_base import model_without_weights
from loracle.forecast.op_costs import Operation, Rates, Work
from loracle.forecast.shape_cache import CachedShapes
from loracle.forecast.trace import synthetic_examples, trace_step
from loracle.model import layers
from loracle.model.inventory import inventory_from_architecture
from loracle.model.live_bytes import LiveBytes
from loracle.placement import resolve_placement

X, W = torch.ones(8, 16), torch.ones(4, 16)


def counted(run):
    work = Work()
    with LiveBytes(watch=work.add):
        run()
    return work


@pytest.mark.parametrize(
    ("run", "flops", "num_bytes"),
    [
        (lambda: X @ W.T, 2 * 8 * 16 * 4, 4 * (8 * 16 + 4 * 16 + 8 * 4)),
        (lambda: X + X, 0, 4 * 3 * 8 * 16),
        (lambda: X.clone().add_(1.0), 0, 4 * 4 * 8 * 16),
        (lambda: X.view(16, 8).T[2:], 0, 0),
        (lambda: torch.empty(100), 0, 0),
        (lambda: torch.zeros(8, 4).addmm_(X, W.T), 2 * 8 * 16 * 4, None),
        (lambda: X.reshape(4, 32), 0, 0),
    ],
)
def test_operations_are_counted_by_their_shapes(run, flops, num_bytes):
    work = counted(run)
    assert work.flops == flops
    if num_bytes is not None:
        assert work.num_bytes == num_bytes


def test_an_operation_takes_as_long_as_the_slower_of_its_sides():
    work = Work()
    work.operations[Operation(flops=1000, num_bytes=10)] = 2
    work.operations[Operation(flops=10, num_bytes=1000)] = 1
    rates = Rates(flop_per_s=100, byte_per_s=50, overhead_s=0.5, overlaps=False)
    assert work.seconds(rates) == pytest.approx(2 * 10 + 20 + 3 * 0.5)
    gpu = Rates(flop_per_s=100, byte_per_s=50, overhead_s=0.5, overlaps=True, factor=2.0)
    assert work.seconds(gpu) == pytest.approx(2 * 40)
    slow = Rates(flop_per_s=1e9, byte_per_s=1e9, overhead_s=0.5, overlaps=True)
    assert work.seconds(slow) == pytest.approx(1.5)


def test_shapes_that_are_known_are_those_that_pytorch_works_out():
    meta = torch.device("meta")
    one, other = torch.ones(3, 1, 5, device=meta), torch.ones(4, 1, device=meta).half()

    def outcomes():
        x = (one + other).transpose(0, 2)
        y = torch.cat([x, x.exp()], dim=1).bfloat16()
        z = (y.mul_(2) @ y.transpose(1, 2)).softmax(dim=-1)
        return [(t.shape, t.stride(), t.dtype) for t in (x, y, z, *z.split(2, dim=1), z.sum(dim=0))]

    plain = outcomes()
    with CachedShapes():
        assert outcomes() == plain
        assert outcomes() == plain


def test_what_is_written_into_has_the_shape_it_would_have():
    x = torch.ones(2, 3, dtype=torch.int32, device="meta")
    with CachedShapes():
        for _ in range(2):
            into = torch.empty(2, 3, dtype=torch.int32, device="meta")
            assert torch.bitwise_right_shift(x, 2, out=into) is into
            grown = torch.empty(0, dtype=torch.int32, device="meta")
            assert torch.bitwise_right_shift(x, 2, out=grown).shape == (2, 3)


def test_flops_are_those_of_pytorch_s_counter():
    from torch.utils.flop_counter import FlopCounterMode

    a, b = torch.ones(3, 4, 5), torch.ones(3, 5, 2)
    image, kernel = torch.ones(1, 2, 8, 8), torch.ones(4, 2, 3, 3)

    def run():
        torch.bmm(a, b)
        torch.addmm(torch.ones(2), a[0], b[0])
        torch.baddbmm(torch.ones(3, 4, 2), a, b)
        torch.conv2d(image, kernel)
        torch.nn.functional.scaled_dot_product_attention(a[None], a[None], a[None])

    with FlopCounterMode(display=False) as theirs:
        run()
    assert counted(run).flops == theirs.get_total_flops()


def test_numbers_and_types_of_scalars_are_told_apart():
    x = torch.ones(3, dtype=torch.int64, device="meta")
    with CachedShapes():
        kinds = [(x + scalar).dtype for scalar in (1, 1.0, True, 1, 1.0)]
    assert kinds == [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32]


def test_what_depends_on_numbers_is_left_alone():
    real = torch.tensor([1.0, 0.0, 2.0])
    with CachedShapes():
        assert len(real[real > 0]) == 2
        assert torch.equal(real + 1, torch.tensor([2.0, 1.0, 3.0]))


@pytest.fixture
def operators():
    """Operators of ours, as the kernels register them: one writes into an input, one multiplies."""
    library = torch.library.Library("loracle", "FRAGMENT")
    library.define("test_into(Tensor(a!) out, Tensor x) -> ()")
    library.define("test_product(Tensor x, Tensor w) -> Tensor")
    library.impl("test_into", lambda out, x: None, "CompositeExplicitAutograd")
    library.impl(
        "test_product", lambda x, w: x.new_empty(len(x), len(w)), "CompositeExplicitAutograd"
    )
    register_flop_formula(torch.ops.loracle.test_product)(lambda x, w, **_: 2 * x[0] * x[1] * w[0])
    yield torch.ops.loracle
    flop_registry.pop(torch.ops.loracle.test_product)
    library._destroy()


def test_an_operator_of_ours_is_one_launch_with_its_bytes(operators):
    work = counted(lambda: operators.test_into(X, X.half()))
    # The copy to 16 bits; then x read, out read and written.
    assert work.operations.total() == 2
    assert work.num_bytes == (4 + 2) * 128 + (2 + 2 * 4) * 128
    work = counted(lambda: operators.test_product(X, W))
    assert work.operations == {Operation(2 * 8 * 16 * 4, 4 * (8 * 16 + 4 * 16 + 8 * 4)): 1}


# Operators of ours that multiply no matrices.
PASSES = {
    "drop", "add_dropped", "rms_norm", "rms_norm_backward", "silu_gate", "silu_gate_backward",
    "rotate", "parts",
}  # fmt: skip


def our_operators():
    """Names of the operators that the layers register."""
    for module in pkgutil.iter_modules(layers.__path__, f"{layers.__name__}."):
        with suppress(ImportError):  # those of Triton, where there is none
            importlib.import_module(module.name)
    return {
        name.removeprefix("loracle::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("loracle::") and not name.startswith("loracle::test_")
    }


def test_every_operator_of_ours_that_multiplies_has_its_flops():
    names = our_operators()
    told = {n for n in names if getattr(torch.ops.loracle, n) in flop_registry}
    assert names - told <= PASSES, "register a FLOP formula, or name it in PASSES"


def test_a_gpu_s_trace_takes_the_kernels_that_a_gpu_has(monkeypatch):
    """Although this machine may have none: dropout and adapters are operators of ours there."""
    seen = set()
    add = Work.add

    def note(work, func, args, kwargs, result):
        seen.add(func.name().partition(".")[0])
        add(work, func, args, kwargs, result)

    monkeypatch.setattr(Work, "add", note)
    config = load_config(overrides=["model=theirs"])
    plan = resolve_placement(
        "all-linear", inventory=inventory_from_architecture(TINY["llama"]), rank=4, alpha=8.0
    )
    with model_without_weights(
        TINY["llama"], plan=plan, device=DEVICES["h100"], dtype=torch.bfloat16, dropout=0.1
    ) as (base, adapter):
        examples = synthetic_examples([(5, 9)] * 2)
        trace_step(base, adapter=adapter, config=config, examples=examples)
    ours = {name.removeprefix("loracle::") for name in seen if name.startswith("loracle::")}
    assert {"narrow", "widen", "outer", "rms_norm", "silu_gate", "rotate"} <= ours
