import pytest

from autosp_aot.targets.devices import DEVICES, Device, step_seconds

UNIT = Device("cuda", 1, flops_per_s=1.0, memory_bytes_per_s=2.0, link_bytes_per_s=4.0, host_bytes_per_s=8.0)


@pytest.mark.parametrize("name", DEVICES)
def test_rates_fall_with_the_distance_of_what_they_reach(name):
    device = DEVICES[name]
    assert 2**36 <= device.memory_bytes < 2**40
    assert device.flops_per_s > device.memory_bytes_per_s > device.link_bytes_per_s > 10e9
    assert device.memory_bytes_per_s >= device.host_bytes_per_s > 10e9


def test_products_passes_over_memory_and_collectives_follow_one_another():
    assert step_seconds(UNIT, flops=1, traffic_bytes=2, moved_bytes=4, host_bytes=0) == 3.0


def test_copies_to_the_host_overlap_with_the_rest():
    assert step_seconds(UNIT, flops=1, traffic_bytes=2, moved_bytes=4, host_bytes=24) == 3.0
    assert step_seconds(UNIT, flops=1, traffic_bytes=2, moved_bytes=4, host_bytes=32) == 4.0
