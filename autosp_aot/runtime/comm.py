"""The ranks of a step over torch.distributed, and the two ways they meet."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autosp_aot import __version__
from autosp_aot.errors import ArtifactError, AutospError, Problem
from autosp_aot.ir.operators import DTYPE_NAMES
from autosp_aot.runtime.agreement import REFUSED, agree, refuse_differences
from autosp_aot.targets.table import CPU, CUDA, ROCM, TARGETS


@dataclass(frozen=True)
class Group:
    """One rank among `size`, on `device`; a group of one, and torch's default group, have no `process_group`."""

    rank: int
    size: int
    device: torch.device
    process_group: dist.ProcessGroup | None = None

    def exchange(self, buffer: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """Send `buffer` (1-D) split by `send_sizes` to the ranks in order; returns what they sent here, in order."""
        if self.size == 1:
            return buffer
        if not self._sends(buffer):  # as bytes
            sizes = [[size * buffer.itemsize for size in each] for each in (send_sizes, receive_sizes)]
            return self.exchange(buffer.view(torch.uint8), *sizes).view(buffer.dtype)
        received = buffer.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, buffer, receive_sizes, send_sizes, group=self.process_group)
        return received

    def sum(self, buffer: Tensor) -> Tensor:
        """The sum of `buffer` over all ranks, in the same storage."""
        if self.size > 1 and not self._sends(buffer):
            return buffer.copy_(self.sum(buffer.int()))  # what overflows is cut off as an i16 sum's is
        if self.size > 1:
            dist.all_reduce(buffer, group=self.process_group)
        return buffer

    def _sends(self, buffer: Tensor) -> bool:
        return DTYPE_NAMES[buffer.dtype] not in TARGETS[self.device.type].unsent

    def reduce_scatter(self, buffer: Tensor) -> Tensor:
        """This rank's of `size` equal parts of the sum of `buffer` (1-D) over all ranks, added in their order."""
        if self.size == 1:
            return buffer
        sizes = [buffer.numel() // self.size] * self.size
        return self.exchange(buffer, sizes, sizes).view(self.size, -1).sum(0)

    def all_gather(self, part: Tensor) -> Tensor:
        """The equally long parts (1-D) of all ranks, end to end."""
        if self.size == 1:
            return part
        whole = part.new_empty(part.numel() * self.size)
        dist.all_gather(list(whole.chunk(self.size)), part, group=self.process_group)
        return whole


@dataclass(frozen=True)
class Mesh:
    """A rank's place among dp x sp ranks: `world` is all of them, `sequence` those that share its sequences.

    dp = 2, sp = 4        sequence ranks
    replica 0             0  1  2  3
    replica 1             4  5  6  7       of the world
    """

    world: Group
    sequence: Group

    @property
    def replicas(self) -> int:
        """How many groups of ranks train on sequences of their own (dp)."""
        return self.world.size // self.sequence.size

    @property
    def replica(self) -> int:
        return self.world.rank // self.sequence.size

    def sum_replicas(self, value: Tensor) -> Tensor:
        """The sum over replicas of what the ranks of each have the same of."""
        return self.world.sum(value.clone() if self.sequence.rank == 0 else torch.zeros_like(value))

    @staticmethod
    def join(
        target: str, sp: int, dp: int | None = None, alone: bool = True, facts: Mapping[str, str] | None = None
    ) -> "Mesh":
        """Join the default group if there is one, else the ranks of torchrun's environment, else be a group of one.

        A group of one needs no process group; it has one where it is not to be `alone`, for those who ask torch.
        `facts` say what this rank is about to run beside target and versions, the same on all ranks.
        Raises ArtifactError: `wrong-device` where this machine lacks the target's device for this rank, `world-size`
        where there are not `dp` (None: any number of) groups of `sp` ranks, and what `agree` raises.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        with Mesh.told():
            check_devices(target, local_rank + 1)
        kind = TARGETS[target]
        device = torch.device("cpu") if kind is CPU else torch.device(kind.device_type, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        own = {"autosp-aot": __version__, "torch": torch.__version__, "target": target}
        facts = {**(facts or {}), **own, "ranks that share a sequence": str(sp)}
        if dist.is_initialized():
            said: list[dict[str, str]] = [{}] * dist.get_world_size()
            dist.all_gather_object(said, facts)
            refuse_differences(said)
        else:
            device_id = device if device.type == "cuda" else None
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                store, rank, size = next(dist.rendezvous("env://"))
                agree(store, rank, size, facts)
                store = dist.PrefixStore("process group", store)
                dist.init_process_group(kind.backend, store=store, rank=rank, world_size=size, device_id=device_id)
            elif alone:
                check_size(1, sp, dp)
                return Mesh(Group(0, 1, device), Group(0, 1, device))
            else:
                os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, also where nobody launched this process
                dist.init_process_group(kind.backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
        world = Group(dist.get_rank(), dist.get_world_size(), device)
        check_size(world.size, sp, dp)
        return Mesh(world, _sequence_group(world, sp))

    @staticmethod
    @contextlib.contextmanager
    def told() -> Iterator[None]:
        """Of what this rank ends with here, the ranks of torchrun's environment are told, who would wait for it."""
        try:
            yield
        except AutospError as error:
            others = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
            if others and not dist.is_initialized():
                store, rank, size = next(dist.rendezvous("env://"))
                with contextlib.suppress(ArtifactError):  # what they are told, which this rank says in full
                    agree(store, rank, size, {REFUSED: str(error).partition("\n")[0]})
            raise

    def leave(self, wait: bool = True) -> None:
        """Take the process groups down, where it went well after waiting for the others."""
        if dist.is_initialized():
            if wait:
                dist.barrier()
            dist.destroy_process_group()


def _sequence_group(world: Group, sp: int) -> Group:
    if sp == world.size:
        return world
    if sp == 1:
        return Group(0, 1, world.device)
    groups = [dist.new_group(list(range(first, first + sp))) for first in range(0, world.size, sp)]
    return Group(world.rank % sp, sp, world.device, groups[world.rank // sp])


def check_size(size: int, sp: int, dp: int | None = None) -> None:
    """Raises ArtifactError `world-size` unless `size` ranks are `dp` (None: any number of) groups of `sp`."""
    if size % sp == 0 and dp in (None, size // sp):
        return
    groups = {None: "a number of groups of ", 1: ""}.get(dp, f"{dp} groups of ")
    raise ArtifactError(Problem(
        "world-size", f"the artifact is for {groups}{sp} ranks, and here are {size}",
        why="each rank of a group runs a program of its own",
        fix=f"start {sp * (dp or 1)} processes, or build for another --sp",
    ))  # fmt: skip


def present_target() -> str:
    """The target of this machine: what torch was built for and finds, else cpu."""
    if not torch.cuda.is_available():
        return CPU.name
    return ROCM.name if torch.version.hip else CUDA.name


def check_devices(target: str, count: int) -> None:
    """Raises ArtifactError `wrong-device` unless this machine has `count` devices for the target."""
    if target == CPU.name:
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
