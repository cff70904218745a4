"""Targets: one record each, and what kernels ask by the type of a device."""

from dataclasses import replace

from autosp_aot.targets.devices import DEVICES
from autosp_aot.targets.table import CUDA, ROCM, TARGETS


def test_devices_are_of_known_targets():
    assert {device.kind for device in DEVICES.values()} == set(TARGETS)


def test_what_a_kernel_asks_by_the_type_of_its_device_is_the_same_of_both_that_torch_calls_cuda():
    assert replace(ROCM, name="cuda") == CUDA


def test_the_type_of_a_target_s_device_finds_its_record():
    assert all(TARGETS[target.device_type].flash == target.flash for target in TARGETS.values())
