"""The instructions that are no operators: their records by name.

What a walk over a program has to know by itself are two: `free`, which ends lifetimes, and `tiles`, which has a body.
"""

from torch import Tensor

from autosp_aot.ir.program import Instr
from autosp_aot.ir.structure.host_copies import HOST_COPIES
from autosp_aot.ir.structure.moves import MOVES, RELAYOUT
from autosp_aot.ir.structure.record import Action, At, HostMemory, Structural, Values

FREE = "free"
TILES = "tiles"


def _free(instr: Instr, sources: Values, targets: Values, at: At, _: HostMemory) -> Action:
    names = instr.refs()

    def step(values: dict[str, Tensor]) -> None:
        for name in names:
            del values[name]

    return step


STRUCTURE = {
    record.name: record
    for record in (
        *MOVES,
        *HOST_COPIES,
        RELAYOUT,
        Structural(FREE, execute=_free, in_tiles=True),
        Structural(TILES),
    )
}


def meets(op: str) -> bool:
    """Whether the ranks meet in an instruction: a collective."""
    return op in STRUCTURE and STRUCTURE[op].meets


def moves(op: str) -> bool:
    """Whether an instruction gives a value placed otherwise, or in other memory of its device."""
    return op in STRUCTURE and STRUCTURE[op].moves


def copies(op: str) -> bool:
    """Whether an instruction is part of a copy to host memory or back."""
    return op in STRUCTURE and STRUCTURE[op].copies


def to_host(op: str) -> bool:
    """Whether an instruction puts its operand into host memory."""
    return op in STRUCTURE and STRUCTURE[op].to_host
