"""The ranks of a step over torch.distributed: which backend and device a target means, and the two ways ranks meet."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autosp_aot.errors import ArtifactError, Problem


@dataclass(frozen=True)
class Target:
    """What differs between targets: the backend of torch.distributed and torch's name of the device."""

    backend: str
    device_type: str


TARGETS = {
    "cpu": Target("gloo", "cpu"),
    "cuda": Target("nccl", "cuda"),
    "rocm": Target("nccl", "cuda"),  # torch calls RCCL nccl, and AMD devices cuda
}


@dataclass(frozen=True)
class Group:
    """One rank among `size`, on `device`; a group of one needs no process group."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(target: str) -> "Group":
        """Join the default group if there is one, else the ranks of torchrun's environment, else be a group of one.

        Raises ArtifactError `wrong-device` where this machine lacks the target's device for this rank.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        check_devices(target, local_rank + 1)
        kind = TARGETS[target]
        device = torch.device(kind.device_type, local_rank) if kind.device_type == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return Group(0, 1, device)
            dist.init_process_group(kind.backend, device_id=device if device.type == "cuda" else None)
        return Group(dist.get_rank(), dist.get_world_size(), device)

    def leave(self) -> None:
        """Wait for the others and take the process group down."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def exchange(self, buffer: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """Send `buffer` (1-D) split by `send_sizes` to the ranks in order; returns what they sent here, in order."""
        if self.size == 1:
            return buffer
        received = buffer.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, buffer, receive_sizes, send_sizes)
        return received

    def sum(self, buffer: Tensor) -> Tensor:
        """The sum of `buffer` over all ranks, in the same storage."""
        if self.size > 1:
            dist.all_reduce(buffer)
        return buffer


def present_target() -> str:
    """The target of this machine: what torch was built for and finds, else cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def check_devices(target: str, count: int) -> None:
    """Raises ArtifactError `wrong-device` unless this machine has `count` devices for the target."""
    if target == "cpu":
        return
    present = present_target()
    if present != target:
        raise ArtifactError(Problem(
            "wrong-device", f"the artifact is for {target}, and torch {torch.__version__} finds {present} here",
            why="kernels and their workspace are fixed when an artifact is built",
            fix=f"run it where torch finds {target}, or build again with --target {present}",
        ))  # fmt: skip
    if torch.cuda.device_count() < count:
        raise ArtifactError(Problem(
            "wrong-device", f"{count} ranks on this machine need as many devices; it has {torch.cuda.device_count()}",
            why="each rank has a device of its own",
            fix="start it under torchrun over more machines, or build with a smaller --sp",
        ))  # fmt: skip
