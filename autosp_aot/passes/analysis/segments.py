"""The forward pass as a chain of segments, split at liveness minima: between the layers of most models.

    h0 = ...                       segment 0
    ------------------------ {h0}  all that the rest of forward reads of what is above
    q, k, v = f(h0)                segment 1: one attention, up to the last liveness minimum before the next
    o = attention(q, k, v)
    h1 = h0 + g(o)
    ------------------------ {h1}
    ...                            the last: from the least before the most alive after the last attention (logits)

What does not depend on both weights and batch (positions, rotary tables) is of no segment: it is cheap and shared.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from autosp_aot.ir.program import Instr, Program
from autosp_aot.ops.table import is_quadratic

# Where there is no attention, a segment is what makes this many times more alive than its boundary.
RISE = 4


@dataclass(frozen=True)
class Segment:
    """A run of forward instructions; `boundary` are the values of the chain that the rest of forward reads after it."""

    instrs: tuple[Instr, ...]
    boundary: tuple[str, ...]


def segments(program: Program) -> tuple[Segment, ...]:
    """The segments of the section forward, in order; one where nothing divides it."""
    forward = program.section("forward")
    flowing = {out.name for instr in _flowing(program) for out in instr.values()}
    alive = alive_after(forward.instrs, flowing)
    values = program.values()
    size = [sum(values[name].nbytes() for name in names) for names in alive]
    anchors = [at for at, instr in enumerate(forward.instrs) if is_quadratic(instr.op)] or _rises(size)
    rest = range(max(anchors, default=-1) + 1, len(size))
    anchors.append(max(rest, key=lambda at: size[at]))
    cuts = [0]
    for previous, anchor in zip((-1, *anchors), anchors):
        places = [at for at in range(max(previous + 1, cuts[-1]), anchor) if alive[at]]
        if places:
            cuts.append(min(reversed(places), key=lambda at: size[at]) + 1)
    ends = (*cuts[1:], len(forward.instrs))
    return tuple(Segment(forward.instrs[lo:hi], tuple(alive[hi - 1])) for lo, hi in zip(cuts, ends))


def numbered(program: Program, found: tuple[Segment, ...]) -> dict[str, int]:
    """Of every forward value that depends on weights and batch, the number of its segment."""
    flowing = {out.name for instr in _flowing(program) for out in instr.values()}
    made = {out.name: at for at, segment in enumerate(found) for instr in segment.instrs for out in instr.values()}
    return {name: at for name, at in made.items() if name in flowing}


def _rises(size: list[int]) -> list[int]:
    """Where what is alive has grown to `RISE` times the least since the last such place."""
    found, least = [], 0
    for at, now in enumerate(size):
        least = min(least, now) if least else now
        if now >= RISE * least > 0:
            found.append(at)
            least = now
    return found


def _flowing(program: Program) -> list[Instr]:
    """The forward instructions that depend on weights and batch."""
    reached = {kind: {e.value.name for e in program.inputs if e.kind == kind} for kind in ("parameter", "batch")}
    found = []
    for instr in program.section("forward").instrs:
        refs, outs = instr.refs(), [out.name for out in instr.values()]
        from_both = True
        for names in reached.values():
            if names.isdisjoint(refs):
                from_both = False
            else:
                names.update(outs)
        if from_both:
            found.append(instr)
    return found


def alive_after(instrs: Sequence[Instr], counted: Collection[str]) -> list[list[str]]:
    """After each instruction, those of the values counted that these make and will read again, as they are made."""
    last_use = {name: at for at, instr in enumerate(instrs) for name in instr.refs()}
    alive: dict[str, None] = {}
    found: list[list[str]] = []
    for at, instr in enumerate(instrs):
        made = [out.name for out in instr.values() if out.name in counted]
        alive.update((name, None) for name in made if last_use.get(name, -1) > at)
        for name in instr.refs():
            if last_use[name] == at:
                alive.pop(name, None)
        found.append(list(alive))
    return found
