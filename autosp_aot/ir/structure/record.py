"""What is known of an instruction that is no operator: one record, which everything that treats instructions reads.

    Structural("all_gather", _to_whole, _exchange_layout, _exchange, _exchanged, operands=1, meets=True)
    Structural("free", execute=_free, in_tiles=True)

It computes nothing: the value that it gives is the one that it takes, placed otherwise or in other memory.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from autosp_aot.ir.placement import Placement
from autosp_aot.ir.program import Instr, Value


@dataclass(frozen=True)
class Exchange:
    """Send `buffer` (1-D) split by `send_sizes` to the ranks in order; the answer holds what they send, in order."""

    buffer: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]


@dataclass(frozen=True)
class Sum:
    """Add `buffer` (1-D) over all ranks; the answer is the total."""

    buffer: Tensor


Meeting = Exchange | Sum
# What is sent at first is None, and then what the ranks made of each meeting: a list of one, for it to be taken out, so
# that nothing else keeps its memory.
Answer = list[Tensor] | None
# An instruction over the values; one where ranks meet is a generator.
Action = Callable[[dict[str, Tensor]], Generator[Meeting, Answer, None] | None]


class HostMemory(Protocol):
    """Copies of one rank's values to host memory and back."""

    def step(self, instr: Instr) -> Action: ...


@dataclass(frozen=True, slots=True)
class At:
    """Which of `ranks` ranks does an instruction, and the number of its box: its own, in a body that of a tile."""

    rank: int
    ranks: int
    box: int


Values = Sequence[Value]
# (instruction, the values it takes and gives, with that rank's shapes, where) -> what it does.
Execute = Callable[[Instr, Values, Values, At, HostMemory], Action]
# Results with their strides, and bytes beside them.
LaidOut = tuple[list[Tensor], int]
# (instruction, operands on meta tensors, the values it takes and gives, where) -> what it makes.
Layout = Callable[[Instr, Sequence[Tensor], Values, Values, At], LaidOut]


@dataclass(frozen=True)
class Structural:
    """An instruction that is no operator.

    name          as programs call it
    fits          whether it takes a value from the first placement to the second; None: it gives no value itself
    layout        the results it makes, and the memory it needs beside them
    execute       how a rank does it
    attributes    what a node of ONNX says of it, where ONNX has no operator for it
    operands      how many it has, for one result; None: any number, with a result for each where it gives any
    meets         whether the ranks meet in it: a collective
    in_tiles      whether a body may have it
    starts        whether its result is there only once it is waited for; what it reads lives until then
    awaits        whether it gives what another started: that one's result, and what that one reads
    to_host       whether its result is in host memory, from the byte that its last argument says
    from_host     whether it takes what is in host memory
    """

    name: str
    fits: Callable[[Placement, Placement], bool] | None = None
    layout: Layout | None = None
    execute: Execute | None = None
    attributes: Callable[[Instr, Values, Values, At], Mapping[str, object]] | None = None
    operands: int | None = None
    meets: bool = False
    in_tiles: bool = False
    starts: bool = False
    awaits: bool = False
    to_host: bool = False
    from_host: bool = False

    @property
    def copies(self) -> bool:
        """Whether it is part of a copy to host memory or back: the same box of the same value."""
        return self.starts or self.awaits

    @property
    def moves(self) -> bool:
        """Whether it gives a value placed otherwise, or in other memory of its device."""
        return self.fits is not None and not self.copies
