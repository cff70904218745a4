"""What differs between targets: one record each, which everything that depends on a target reads.

Torch calls AMD devices cuda and RCCL nccl. A kernel that only sees tensors asks by the type of their device, so what
kernels read of CUDA and of ROCm is the same; what is not has to be decided when the artifact is built.
"""

from dataclasses import dataclass, replace

from autosp_aot.targets.flash import CPU_FLASH, CUDA_FLASH, ROCM_FLASH, Flash


@dataclass(frozen=True)
class Target:
    """A kind of device that a program is made for.

    backend             of torch.distributed
    device_type         torch's name of the device
    attention_block     rows and keys of a block of blockwise attention: what caches hold, or what is worth a launch
    flash               what flash attention takes and makes
    unsent              dtypes that `backend` cannot send (ProcessGroupNCCL.cpp, ncclDataType)
    """

    name: str
    backend: str
    device_type: str
    attention_block: int
    flash: Flash
    unsent: tuple[str, ...] = ()


CPU = Target("cpu", "gloo", "cpu", 256, CPU_FLASH)
CUDA = Target("cuda", "nccl", "cuda", 1024, CUDA_FLASH, unsent=("i16",))
ROCM = replace(CUDA, name="rocm", flash=ROCM_FLASH)
TARGETS = {target.name: target for target in (CPU, CUDA, ROCM)}
