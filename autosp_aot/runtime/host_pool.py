"""Values that wait in host memory: a pool, and copies to it and back on a stream of their own.

    %h.offload = offload(%h, 0)             the copy into byte 0 of the pool is started
    %h.host = wait(%h.offload, %h)          what comes next may take it as done
    %h.fetch = fetch(%h.host)               the copy back is started
    %h.back = wait(%h.fetch, %h.host)       what comes next may read it

What a copy reads lives until its wait, so no memory is given to another value while it is read. All copies of a rank go
one after the other, so bytes of the pool that are used again are read before they are written.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.program import Instr, Program
from autosp_aot.ir.structure.table import STRUCTURE, to_host

Values = dict[str, Tensor]


class Link(Protocol):
    """How a device copies to host memory and back."""

    def memory(self, nbytes: int) -> Tensor:
        """Bytes of host memory."""

    def copy(self, target: Tensor, source: Tensor) -> object:
        """Begin a copy; a ticket to wait with."""

    def wait(self, ticket: Any) -> None:
        """What comes next may take the copy of that ticket as done."""


class Direct:
    """Copies between tensors of the CPU, done at once."""

    def __init__(self, device: torch.device):
        pass

    def memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait(self, ticket: None) -> None:
        pass


class Stream:
    """Copies on a stream beside the one that computes, by CUDA's names, which ROCm builds of torch share."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def memory(self, nbytes: int) -> Tensor:
        """Pinned memory of just that size: torch's own pinned allocator rounds up to a power of two."""
        memory = torch.empty(nbytes, dtype=torch.uint8)
        portable = 1
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, portable)) != 0:
            raise RuntimeError("the memory cannot be pinned")
        weakref.finalize(memory, self.unpin, memory.data_ptr()).atexit = False
        return memory

    def unpin(self, address: int) -> None:
        self.stream.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)


LINKS: dict[str, Callable[[torch.device], Link]] = {"cpu": Direct, "cuda": Stream}


@dataclass(frozen=True)
class _Buffer:
    """A pool's memory, and the values that were put there."""

    memory: Tensor
    values: list[weakref.ref] = field(default_factory=list)

    @property
    def used(self) -> bool:
        return any(value() is not None for value in self.values)


class Host:
    """The host memory of one rank's program, allocated at once, and the steps of its copies.

    A step keeps its buffer from its first offload until its last value is released. Where another step begins before
    that (two losses, then both backward), it gets a second buffer. Raises ArtifactError (`host-memory`) where there is
    not enough.
    """

    def __init__(self, program: Program, device: torch.device):
        offloads = [instr for instr in program.instrs() if to_host(instr.op)]
        self.nbytes = max(1, *(instr.args[-1] + instr.values()[0].nbytes() for instr in offloads), 1)  # pinning 0 fails
        self.first = offloads[0] if offloads else None
        self.device = device
        self.link: Link = LINKS[device.type](device) if offloads else Direct(device)
        self.buffers = [self._buffer()] if offloads else []
        self.buffer: _Buffer | None = None
        self.tickets: dict[str, object] = {}

    def step(self, instr: Instr) -> Callable[[Values], None]:
        """An `offload`, `fetch` or `wait` to run over the values of a step."""
        record = STRUCTURE[instr.op]
        if record.awaits:
            return self._wait(instr)
        return self._offload(instr) if record.to_host else self._fetch(instr)

    def _offload(self, instr: Instr) -> Callable[[Values], None]:
        (name,), at, out, begins = instr.refs(), instr.args[-1], instr.values()[0], instr is self.first

        def step(values: Values) -> None:
            buffer = self.buffer = self._unused() if begins else self.buffer
            assert buffer is not None, "the first offload has begun the step"
            source = values[name]
            strides = torch.empty_like(source, device="meta").stride()
            place = buffer.memory[at : at + out.nbytes()].view(source.dtype).as_strided(source.shape, strides)
            buffer.values.append(weakref.ref(place))
            self.tickets[out.name] = self.link.copy(place, source)
            values[out.name] = place

        return step

    def _fetch(self, instr: Instr) -> Callable[[Values], None]:
        (name,), out = instr.refs(), instr.values()[0]

        def step(values: Values) -> None:
            target = torch.empty_like(values[name], device=self.device)
            self.tickets[out.name] = self.link.copy(target, values[name])
            values[out.name] = target

        return step

    def _wait(self, instr: Instr) -> Callable[[Values], None]:
        copy, out = instr.refs()[0], instr.values()[0]

        def step(values: Values) -> None:
            self.link.wait(self.tickets.pop(copy))
            values[out.name] = values[copy]

        return step

    def _unused(self) -> _Buffer:
        buffer = next((buffer for buffer in self.buffers if not buffer.used), None)
        if buffer is None:
            buffer = self._buffer()
            self.buffers.append(buffer)
        buffer.values.clear()
        return buffer

    def _buffer(self) -> _Buffer:
        try:
            return _Buffer(self.link.memory(self.nbytes))
        except RuntimeError as error:
            raise ArtifactError(Problem(
                "host-memory", f"{self.nbytes} bytes of host memory cannot be had for what a rank keeps there",
                why=str(error).partition("\n")[0], fix="build with --offload off, or run on a host with more memory",
            )) from error  # fmt: skip
