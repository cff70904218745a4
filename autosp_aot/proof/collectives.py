"""All ranks together: the same collectives, in the same order, with sizes that agree, or the first that does not."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.placement import Placement
from autosp_aot.ir.program import Instr, Program, Value, at_rank
from autosp_aot.ir.structure.table import STRUCTURE, meets
from autosp_aot.ir.transfers import transfers

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """One collective as one rank sees it. Sizes are in elements, a number a peer; a sum has the same for all."""

    section: str
    op: str
    value: str
    dtype: str
    send_sizes: Sizes
    receive_sizes: Sizes


def collectives_of(program: Program, rank: int) -> list[Collective]:
    """The collectives of one rank, in order, of its own program (`Program.for_rank`) or that of all ranks."""
    return collectives_by_rank(program, [rank])[rank]


def collectives_by_rank(program: Program, ranks: Iterable[int]) -> dict[int, list[Collective]]:
    """The collectives of some ranks, in order."""
    values = program.values()
    meetings = [(s.name, instr) for s in program.sections for instr in s.instrs if meets(instr.op)]
    return {rank: [_collective(*meeting, values, rank, program.ranks) for meeting in meetings] for rank in ranks}


def check_collectives(by_rank: list[list[Collective]]) -> None:
    """Raise ArtifactError (`collective-mismatch`) where the ranks would wait for each other or mix up data."""
    first = by_rank[0]
    for rank, mine in enumerate(by_rank):
        for at, (a, b) in enumerate(zip(first, mine)):
            if (a.section, a.op, a.value) != (b.section, b.op, b.value):
                raise _mismatch(f"collective {at} of rank {rank} is {_said(b)}", f"that of rank 0 is {_said(a)}")
            if a.dtype != b.dtype:
                raise _mismatch(f"{_said(b)} of rank {rank} is {b.dtype}", f"on rank 0 it is {a.dtype}")
        if len(mine) != len(first):
            more = (mine if len(mine) > len(first) else first)[min(len(mine), len(first))]
            what = f"rank {rank} has {len(mine)} collectives, rank 0 {len(first)}"
            raise _mismatch(what, f"the first more is {_said(more)}")
    for at, step in enumerate(zip(*by_rank)):
        for sender, mine in enumerate(step):
            for receiver, other in enumerate(step):
                if mine.send_sizes[receiver] != other.receive_sizes[sender]:
                    raise _mismatch(
                        f"in {_said(mine)} rank {sender} sends {mine.send_sizes[receiver]} elements to rank {receiver}",
                        f"which expects {other.receive_sizes[sender]}",
                    )


def _collective(section: str, instr: Instr, values: dict[str, Value], rank: int, ranks: int) -> Collective:
    source, target = values[instr.refs()[0]], instr.values()[0]
    source = replace(source, shape=tuple(at_rank(n, rank) for n in source.shape))
    if STRUCTURE[instr.op].operands is None:
        count = sum(values[name].nbytes(rank) for name in instr.refs())
        sizes = ((count,) * ranks, (count,) * ranks)
    else:
        sizes = _sizes(source.placement, target.placement, source.whole_shape, rank, ranks)
    operands = ", ".join(out.name for out in instr.values())
    return Collective(section, instr.op, operands, target.dtype, *sizes)


@lru_cache(maxsize=4096)
def _sizes(source: Placement, target: Placement, whole: Sizes, rank: int, ranks: int) -> tuple[Sizes, Sizes]:
    def elements(sender: int, receiver: int) -> int:
        return sum(piece.elements(whole) for piece in transfers(source, target, whole, sender, receiver))

    return tuple(elements(rank, peer) for peer in range(ranks)), tuple(elements(peer, rank) for peer in range(ranks))


def _said(collective: Collective) -> str:
    return f"{collective.op} of {collective.value} in {collective.section}"


def _mismatch(what: str, why: str) -> ArtifactError:
    return ArtifactError(Problem("collective-mismatch", what, why=why, fix="build the artifact again"))
