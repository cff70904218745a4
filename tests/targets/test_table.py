"""Targets: one record each, and what kernels ask by the type of a device."""

from dataclasses import fields, replace

import pytest

from autosp_aot.targets.devices import DEVICES
from autosp_aot.targets.flash import Flash
from autosp_aot.targets.table import CPU, CUDA, ROCM, TARGETS


def test_devices_are_of_known_targets():
    assert {device.kind for device in DEVICES.values()} == set(TARGETS)


def test_what_a_kernel_asks_by_the_type_of_its_device_is_the_same_of_both_that_torch_calls_cuda():
    build = {"grad_v_like_k", "splits", "sources"}  # what only a plan asks
    for name in {field.name for field in fields(Flash)} - build:
        assert getattr(ROCM.flash, name) == getattr(CUDA.flash, name)
    assert replace(ROCM, name="cuda", flash=CUDA.flash) == CUDA


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_field_that_is_a_demand_cites_its_source(target):
    plain = {"sources", "width_limit", "width_multiple", "alignment_bytes", "grad_v_like_k", "splits", "accumulates"}
    cited = {field.name for field in fields(Flash)} - (plain if target is CPU else {"sources"})
    assert target.flash.sources.keys() == cited
