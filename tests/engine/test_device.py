"""auto picks what the machine has; what it lacks is refused by name."""

import subprocess
import sys

import pytest
import torch

from loracle.engine import device
from loracle.engine.device import (
    choose_device,
    choose_dtype,
    cpu_multiplies_bf16,
    dtype_name,
    faster_fp32,
    keep_large_blocks,
    multiplies_in_fp32,
    synchronize,
)
from loracle.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def with_gpus(monkeypatch, count: int, *, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)


@pytest.mark.parametrize(
    ("count", "requested", "chosen"),
    [(0, "auto", "cpu"), (1, "auto", "cuda"), (2, "cuda:1", "cuda:1"), (1, "cpu", "cpu")],
)
def test_devices(monkeypatch, count, requested, chosen):
    with_gpus(monkeypatch, count)
    assert choose_device(requested) == torch.device(chosen)


@pytest.mark.parametrize(("count", "requested"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, count, requested):
    with_gpus(monkeypatch, count)
    with pytest.raises(ConfigError) as caught:
        choose_device(requested)
    message = f"device: '{requested}' is not available ({count} CUDA devices); use auto or cpu"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_is_bf16_where_a_gpu_multiplies_it(monkeypatch, capability, dtype):
    with_gpus(monkeypatch, 1, capability=capability)
    assert choose_dtype("auto", device=CUDA) == dtype


@pytest.mark.parametrize(
    ("avx", "amx", "dtype"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_auto_is_bf16_where_a_cpu_multiplies_it(monkeypatch, avx, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_dtype("auto", device=CPU) == dtype


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_that_one_everywhere(name):
    for where in (CPU, CUDA):
        assert dtype_name(choose_dtype(name, device=where)) == name


def test_this_cpu_can_be_asked():
    assert cpu_multiplies_bf16() in (True, False)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_blocks_are_kept_once_freed():
    """In a process of its own, because the allocator cannot be told otherwise again."""
    code = (
        "import psutil, torch\n"
        "from loracle.engine.device import keep_large_blocks\n"
        "assert keep_large_blocks()\n"
        "resident = lambda: psutil.Process().memory_info().rss\n"
        "block = torch.ones(64 * 2**20)\n"
        "before = resident(); del block\n"
        "print(before - resident())\n"
    )
    given_back = int(subprocess.check_output([sys.executable, "-c", code]))
    assert given_back < 50 * 2**20


@pytest.mark.parametrize(("obeys", "reported"), [(1, True), (0, False)])
def test_glibc_is_told_both_thresholds(monkeypatch, obeys, reported):
    requested = {}

    class Libc:
        def mallopt(self, option: int, value: int) -> int:
            requested[option] = value
            return obeys

    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: Libc())
    assert keep_large_blocks() is reported
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    assert requested == {-3: 2**30, -1: 2**31 - 1}


def test_only_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(CPU)
    synchronize(CUDA)
    assert waited == [CUDA]


@pytest.fixture
def fp32_setting():
    """The switch as it was, whatever a test does to it."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_fp32_products_are_fp32_with_and_without_the_switch(fp32_setting):
    before = fp32_setting()
    assert multiplies_in_fp32()
    with faster_fp32(torch.device("cpu"), torch.float32) as by:
        assert (by == "onednn") is (fp32_setting() == "medium")
        assert multiplies_in_fp32()
        draw = torch.Generator().manual_seed(0)
        x, w = (torch.randn(200, 576, generator=draw) for _ in range(2))
        exact = x.double() @ w.double().T
        # bf16 inputs would be off by 2^-9 of a typical term, a hundred times as much
        assert (x @ w.T - exact).abs().max() < 1e-5 * exact.std()
    assert fp32_setting() == before


def test_a_product_of_rounded_inputs_is_found_out(monkeypatch, fp32_setting):
    before = fp32_setting()
    monkeypatch.setattr(device, "multiplies_in_fp32", lambda: False)
    with faster_fp32(torch.device("cpu"), torch.float32) as by:
        assert by == "default"
        assert fp32_setting() == before


def test_the_test_product_tells_bf16_from_fp32(monkeypatch):
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *a: full(*a).bfloat16().float())
    assert not multiplies_in_fp32()


@pytest.mark.parametrize(
    ("where", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16)]
)
def test_only_fp32_on_a_cpu_is_switched(fp32_setting, where, dtype):
    before = fp32_setting()
    with faster_fp32(torch.device(where), dtype) as by:
        assert (by, fp32_setting()) == ("default", before)


def test_the_switch_is_taken_back_after_an_error(fp32_setting):
    before = fp32_setting()
    with pytest.raises(KeyError), faster_fp32(torch.device("cpu"), torch.float32):
        raise KeyError
    assert fp32_setting() == before


@pytest.mark.parametrize("change", [keep_large_blocks, device.release_free_memory])
def test_other_platforms_and_a_libc_without_the_function_are_left_alone(monkeypatch, change):
    monkeypatch.setattr(device.sys, "platform", "darwin")
    assert change() is False
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: object())
    assert change() is False
