"""Ranks whose memory is alike, so that one of them says what all of them take.

    13 positions over 4 ranks      4 3 3 3     rank 0, and rank 1 for all others
    and one more on each side      5 5 5 4     rank 0, rank 1 (it sends to both sides) for rank 2, rank 3

Memory follows from the shapes of a rank's boxes, the parts that it sends and receives, and where in their group its
query heads begin.
"""

from collections.abc import Iterable
from functools import lru_cache

from autosp_aot.ir.placement import Placement, local_shape
from autosp_aot.ir.program import PerRank, Program, Value
from autosp_aot.ir.structure.table import meets
from autosp_aot.ir.transfers import Move
from autosp_aot.ops.table import OURS


def unlike_ranks(program: Program, ranks: Iterable[int] | None = None) -> list[int]:
    """The first rank of each kind among `ranks` (None: all): those of a kind take the same memory throughout."""
    values = program.values()
    rows: dict[tuple, None] = {}  # what differs, a column a rank (so many columns a rank in a body of tiles)
    moves: dict[tuple, None] = {}
    for instr in program.instrs():
        for out in instr.values():
            rows.update((n.values, None) for n in out.shape if isinstance(n, PerRank))
        if instr.op in OURS and OURS[instr.op].over_heads and isinstance(instr.args[-1], PerRank):
            group, first_head = instr.args[-2:]
            rows[tuple(head % group for head in first_head.values)] = None
        if meets(instr.op):
            source, target = values[instr.refs()[0]], instr.values()[0]
            moves[source.placement, target.placement, source.whole_shape] = None
    rows.update((_parts(*move, program.ranks), None) for move in moves)
    kinds: dict[tuple, int] = {}
    for rank in range(program.ranks) if ranks is None else ranks:
        kinds.setdefault(tuple(_own(row, rank, program.ranks) for row in rows), rank)
    return list(kinds.values())


def _own(row: tuple, rank: int, ranks: int) -> tuple:
    tiles = len(row) // ranks
    return row[rank * tiles : (rank + 1) * tiles]


@lru_cache(maxsize=4096)
def _parts(source: Placement, target: Placement, whole_shape: tuple[int, ...], ranks: int) -> tuple[tuple, ...]:
    """What each rank sends and receives, in coordinates of its boxes."""
    found = []
    for rank in range(ranks):
        before, after = (Value("", "f32", local_shape(whole_shape, at, rank), at) for at in (source, target))
        move = Move(before, after, rank, ranks)
        found.append((tuple(move.sends), tuple(move.fills)))
    return tuple(found)
