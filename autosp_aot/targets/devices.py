"""Devices that a plan can be made for: room and rates of public data sheets. We have measured none of them."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device, one rank.

    kind                    of `table.TARGETS`: what a program is made for
    memory_bytes            its memory, of which drivers keep up to 1 GiB: a reserve has to hold that too
    flops_per_s             dense bf16 products, without sparsity
    memory_bytes_per_s      its own memory
    link_bytes_per_s        to the other ranks of its machine, one way
    host_bytes_per_s        to the machine's memory, one way
    """

    kind: str
    memory_bytes: int
    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float


# "80 GB" of NVIDIA's are 80 GiB: nvidia-smi counts 81,920 MiB on A100, 81,559 on H100, 143,771 on H200.
DEVICES = {
    # NVIDIA A100 80GB SXM data sheet, 2021: 312 TFLOPS, 2,039 GB/s; both ways NVLink 600 GB/s, PCIe 4 64 GB/s.
    "a100-80": Device("cuda", 80 * GIB, 312e12, 2.039e12, 300e9, 32e9),
    # NVIDIA H100 SXM data sheet, 2023: 1,979 TFLOPS sparse, half of that dense, 3.35 TB/s; both ways NVLink 900 GB/s,
    # PCIe 5 128 GB/s.
    "h100": Device("cuda", 80 * GIB, 989.5e12, 3.35e12, 450e9, 64e9),
    # NVIDIA H200 SXM data sheet, 2024: as H100, with 141 GB (of which programs get 139 GiB) at 4.8 TB/s.
    "h200": Device("cuda", 139 * GIB, 989.5e12, 4.8e12, 450e9, 64e9),
    # AMD Instinct MI300X data sheet, 2023: 1,307.4 TFLOPS dense, 192 GB at 5.3 TB/s; both ways 7 Infinity Fabric links
    # of 128 GB/s, which an exchange among all eight uses together, PCIe 5 128 GB/s.
    "mi300": Device("rocm", 192 * GIB, 1307.4e12, 5.3e12, 448e9, 64e9),
    # One socket of AMD EPYC 9654, data sheet, 2022: 96 cores at 2.4 GHz with 64 bf16 operations a cycle, 12 channels of
    # DDR5-4800, here with 64 GiB each; ranks meet over PCIe 5, and host memory is its own.
    "cpu": Device("cpu", 768 * GIB, 14.7e12, 460.8e9, 64e9, 460.8e9),
}


def step_seconds(device: Device, flops: int, traffic_bytes: int, moved_bytes: int, host_bytes: int) -> float:
    """Forward and backward of a rank at the rates of the data sheet, which no program reaches.

    Products, then `traffic_bytes` read and written, then collectives, as nothing of them overlaps; copies to the host
    and back overlap with all of that.
    """
    work = flops / device.flops_per_s + traffic_bytes / device.memory_bytes_per_s
    return max(work + moved_bytes / device.link_bytes_per_s, host_bytes / device.host_bytes_per_s)
