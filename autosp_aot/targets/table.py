"""What differs between targets: one record each, which everything that depends on a target reads.

Torch calls AMD devices cuda and RCCL nccl. A kernel that only sees tensors asks by the type of their device, so what
kernels read of CUDA and of ROCm is the same; what is not has to be decided when the artifact is built.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Flash:
    """Flash attention of a target: the dtypes and head dims that it takes, and the memory that it makes.

    `lse_by_row`: the log of the sum of exponentials lies [B, S, N] in memory, else [B, N, S]. `accumulates`: backward
    adds up grad_q in fp32, rows rounded to 128 and widths to 32, and keeps one more fp32 number a row.
    """

    dtypes: tuple[str, ...]
    width_limit: int
    width_multiple: int
    lse_by_row: bool
    accumulates: bool


@dataclass(frozen=True)
class Target:
    """A kind of device that a program is made for.

    backend             of torch.distributed
    device_type         torch's name of the device
    attention_block     rows and keys of a block of blockwise attention: what caches hold, or what is worth a launch
    flash               what flash attention takes and makes
    """

    name: str
    backend: str
    device_type: str
    attention_block: int
    flash: Flash


CPU = Target("cpu", "gloo", "cpu", 256, Flash(("f64", "f32", "bf16", "f16"), 2**31, 1, True, False))
CUDA = Target("cuda", "nccl", "cuda", 1024, Flash(("bf16", "f16"), 256, 8, False, True))
ROCM = replace(CUDA, name="rocm")
TARGETS = {target.name: target for target in (CPU, CUDA, ROCM)}
