"""Devices are named as people name them, and known again by what PyTorch calls them."""

import pytest

from loracle.errors import UsageError
from loracle.forecast.devices import DEVICES, device_of, like_this, this_device


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_of_the_table_is_found_by_its_name(name):
    device = device_of(name.upper())
    assert device is DEVICES[name]
    assert device.is_gpu
    assert device.tflop_per_s > 0
    assert device.gbyte_per_s > 0


@pytest.mark.parametrize(
    ("given", "gib"), [("24", 24), ("24GiB", 24), ("16 gb", 16), ("7.5g", 7.5)]
)
def test_a_device_can_be_known_by_its_memory_alone(given, gib):
    device = device_of(given)
    assert device.memory_gib == gib
    assert device.tflop_per_s is None


@pytest.mark.parametrize(("given", "hint"), [("h10", "'h100'"), ("a100", "'a100-40'"), ("0", "")])
def test_other_names_are_refused_with_the_nearest(given, hint):
    with pytest.raises(UsageError, match=r"^--gpu: no device '.*' \(known: t4, l4, ") as found:
        device_of(given)
    assert hint in str(found.value)


@pytest.mark.parametrize(
    ("says", "gib", "name"),
    [
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA L40S", 44.4, None),
        ("NVIDIA GeForce RTX 3090", 23.6, None),
    ],
)
def test_a_gpu_is_known_by_what_it_calls_itself(says, gib, name):
    found = like_this(says, memory_gib=gib)
    assert (found.name if found else None) == name


def test_this_machine_is_a_device_too():
    device = this_device()
    assert device.memory_gib > 1
    assert device.name
