"""What segments need on every rung, measured on the program as it is really scheduled.

    segment   0     1          2     3        ...     every segment on another rung than the one before it:
    rung      all   products   sac   moved    ...     one curve of memory says what each of them takes

Segments alike (the same operators and shapes) need alike, so a model of equal layers is measured with one program, and
one of few layers with a few.
"""

from dataclasses import dataclass
from itertools import accumulate

from autosp_aot.ir.program import Program, stands_for
from autosp_aot.memory.costs import curve
from autosp_aot.passes.keep.rungs import RUNGS, Ladder, Needs, Schedule, names


@dataclass
class _Stretch:
    """Moments in which the step is in a segment: bytes alive before them, and the most while they last."""

    before: int
    most: int = 0


def measure(ladder: Ladder, schedule: Schedule) -> Needs:
    """Measure the segments in turns on the rungs; nothing waits on the host."""
    last = ladder.last
    kinds = [_kind(ladder, at) for at in range(last)]
    alike = [[at for at in range(last) if kinds[at] == kind] for kind in dict.fromkeys(kinds)]
    forward, begun, tail, end = [0] * last, [0] * last, 0, 0
    works: dict[tuple[tuple, str], int] = {}
    for turn in range(-(-len(RUNGS) // max(map(len, alike), default=len(RUNGS)))):
        taken = {at: _turn(list(ladder.rungs[at]), place + turn * len(group))
                 for group in alike for place, at in enumerate(group)}  # fmt: skip
        kept = set(names(ladder.segments[-1].instrs)).union(*(segment.boundary for segment in ladder.segments))
        program = schedule(kept.union(*(ladder.rungs[at][rung] for at, rung in taken.items())), "off")
        before = _kept_before(ladder, program)
        in_forward, in_backward, after = _stretches(ladder, program)
        end = max(end, after)
        tail = max(tail, *(found[last].most - before[last] for found in (in_forward, in_backward) if last in found))
        for at, rung in taken.items():
            if at in in_forward:
                forward[at] = max(forward[at], in_forward[at].most - before[at])
            stretch = in_backward.get(at, _Stretch(before[at + 1], before[at + 1]))
            begun[at] = max(begun[at], stretch.before - before[at + 1])
            works[kinds[at], rung] = max(works.get((kinds[at], rung), 0), stretch.most - stretch.before)
    begun = list(accumulate(begun, min))  # gradients only grow: what is more is left over from the rung of a neighbour
    most = {rung: max((made for (_, on), made in works.items() if on == rung), default=0) for rung in RUNGS}
    work = {(at, rung): works.get((kinds[at], rung), most[rung]) for at in range(last) for rung in ladder.rungs[at]}
    return Needs(tuple(forward), tuple(begun), work, tail, end)


def _turn(rungs: list[str], turn: int) -> str:
    return rungs[turn % len(rungs)]


def _kind(ladder: Ladder, at: int) -> tuple:
    instrs = ladder.segments[at].instrs
    return tuple((instr.op, *(ladder.values[name].shape for name in names([instr]))) for instr in instrs)


def _kept_before(ladder: Ladder, program: Program) -> list[int]:
    """Bytes that the segments before each keep."""
    own = [0] * len(ladder.segments)
    for name in program.section("backward").takes:
        if name in ladder.number:
            own[ladder.number[name]] += ladder.nbytes([name])
    return [sum(own[:at]) for at in range(len(own))]


def _stretches(ladder: Ladder, program: Program) -> tuple[dict[int, _Stretch], dict[int, _Stretch], int]:
    """Of the segments in forward and in backward, and the most that is alive after both."""
    entered = {name: at + 1 for at, segment in enumerate(ladder.segments) for name in segment.boundary}
    number = ladder.number | entered  # what a segment begins with says that the step is in it
    forward: dict[int, _Stretch] = {}
    backward: dict[int, _Stretch] = {}
    moments, alive = iter(curve(program, ladder.rank, ladder.target)), 0
    for name, current in (("forward", 0), ("backward", ladder.last)):
        ahead = name == "forward"
        for instr, moment in zip(program.section(name).instrs, moments):
            called = [stands_for(name) for name in (names([instr]) if ahead else (*names([instr]), *instr.refs()))]
            table = ladder.number if ahead else number
            furthest = max((table[name] for name in called if name in table), default=current)
            current = max(current, furthest) if ahead else min(current, furthest)
            stretch = (forward if ahead else backward).setdefault(current, _Stretch(alive))
            stretch.most, alive = max(stretch.most, moment.peak_bytes), moment.alive_bytes
    return forward, backward, max((moment.peak_bytes for moment in moments), default=0)
