"""What each segment of the forward pass may keep, what that takes and what it costs, for the solver of `budget.py`.

    rung        kept of a segment, beside its boundary             done again
    all         whatever backward reads
    products    products, collectives, attention                   what is element by element
    sac         collectives, attention                             products too
    moved       the same but what attention's results become       the collectives after attention
    attended    attention                                          every collective
    full        nothing                                            attention

From `sac` on, several segments may be on a rung together, with the boundaries between them not kept either. What a rung
costs is counted at the rates of the device's data sheet; what it takes is measured, see `needs.py`.
"""

from collections.abc import Callable, Collection, Iterable, Set
from dataclasses import dataclass, replace
from functools import cache

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.ir.operators import makes_view
from autosp_aot.ir.program import Instr, Program
from autosp_aot.ir.structure.table import meets
from autosp_aot.memory.costs import flops, heaviest, received_of
from autosp_aot.ops.table import is_quadratic
from autosp_aot.passes.analysis.segments import Segment, numbered
from autosp_aot.passes.keep.knapsack import Option
from autosp_aot.passes.recompute import is_costly
from autosp_aot.targets.devices import DEVICES

RUNGS = ("all", "products", "sac", "moved", "attended", "full")
ALONE = RUNGS[:2]
# The choices that are tried one after the other, by rung and whether values may wait on the host: no rate says how long
# ranks wait for each other, so collectives are repeated where nothing else fits, attention last.
TIERS = ((RUNGS[:3], False), (RUNGS[:3], True), (RUNGS[:5], True), (RUNGS, True))
RUNS = (1, 2, 4, 8)

# Makes the program that keeps these values, with this policy of what waits in host memory.
Schedule = Callable[[Collection[str], str], Program]


@dataclass(frozen=True, slots=True)
class Choice(Option):
    """An option, the rung it is, the values that its segments keep, and whether these wait in host memory."""

    rung: str
    kept: frozenset[str]
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class SegmentCost:
    """What a segment keeps, what it holds once it was run on the way to a later one, and the time to run it again."""

    kept_bytes: int
    held_bytes: int
    seconds: float


class Ladder:
    """The segments of a program that has sections and is not scheduled yet, and what each keeps on every rung."""

    def __init__(self, program: Program, segments: tuple[Segment, ...], config: BuildConfig):
        self.ranks, self.rank, self.target = program.ranks, heaviest(program), config.target
        self.device = config.device or next(d for d in DEVICES.values() if d.kind == config.target)
        self.segments, self.values = segments, program.for_rank(self.rank).values()
        self.last = len(self.segments) - 1
        self.made = {name: i for i in program.section("forward").instrs for name in names([i])}
        self.number = numbered(program, self.segments)
        backward = program.section("backward")
        read = {name for instr in backward.instrs for name in instr.refs()} | {name for _, name in backward.gives}
        self.read = [[name for name in names(segment.instrs) if name in read] for segment in self.segments]
        self.rungs = [self.distinct(at) for at in range(self.last)]
        self.part = cache(self._part)

    def distinct(self, at: int) -> dict[str, frozenset[str]]:
        """What the rungs of a segment keep; of those that keep the same, the first."""
        found: dict[frozenset[str], str] = {}
        for level, rung in enumerate(RUNGS):
            on = [n for i in self.segments[at].instrs if self.dropped(i) > level for n in names([i])]
            found.setdefault(frozenset(set(on) & set(self.read[at]) if rung == "all" else on), rung)
        return {rung: kept for kept, rung in found.items()}

    def dropped(self, instr: Instr) -> int:
        """The number of the first rung that does not keep what `instr` makes."""
        if is_quadratic(instr.op):
            return RUNGS.index("full")
        if meets(instr.op):
            attended = all(is_quadratic(self.made[name].op) for name in instr.refs() if name in self.made)
            return RUNGS.index("moved" if attended else "attended")
        return RUNGS.index("sac" if flops(instr, self.values, self.rank) else "products")

    def sendable(self, choice: Choice, run: range) -> bool:
        """Whether a run keeps only boundaries and what costs much to do again."""
        boundaries = {name for segment in self.segments for name in segment.boundary}
        return all(is_costly(self.made[n].op) for at in run for n in self.rungs[at][choice.rung] - boundaries)

    def _part(self, at: int, kept: frozenset[str], inner: bool) -> "SegmentCost":
        """Segment `at` where it keeps `kept`; `inner` where a later segment of its run needs its boundary again."""
        boundary = self.segments[at].boundary
        way: list[Instr] = []
        used: Set[str] = kept.intersection(boundary)
        held: set[str] = set()
        if inner:
            way, used = self.again(at, boundary, kept)
            held = {name for instr in way for name in names([instr]) if is_costly(instr.op) or name in boundary}
        rest, reached = self.again(at, self.read[at], kept | held)
        seconds = sum(map(self.seconds, (*way, *rest)))
        return SegmentCost(self.nbytes(used | (reached - held)), self.nbytes(held), seconds)

    def again(self, at: int, wanted: Iterable[str], kept: Collection[str]) -> tuple[list[Instr], set[str]]:
        """The instructions of segment `at` that make `wanted` from what is kept, and what of that they read."""
        stack, instrs, seen, reached = list(wanted), {}, set(), set()
        while stack:
            name = stack.pop()
            if name in seen or self.number.get(name) != at:
                continue
            seen.add(name)
            if name in kept:
                reached.add(name)
            else:
                instr = self.made[name]
                instrs[names([instr])[0]] = instr
                stack += instr.refs()
        return list(instrs.values()), reached

    def nbytes(self, some: Iterable[str]) -> int:
        return sum(self.values[name].nbytes() for name in some)

    def seconds(self, instr: Instr) -> float:
        """The time of a call: bytes received, or products and bytes read and written."""
        if meets(instr.op):
            pairs = zip(instr.refs(), instr.values())
            received = sum(received_of(self.values[name], out, self.ranks) for name, out in pairs)
            return received / self.device.link_bytes_per_s
        if makes_view(instr.op):
            return 0.0
        touched = self.nbytes((*instr.refs(), *names([instr]))) / self.device.memory_bytes_per_s
        return touched + flops(instr, self.values, self.rank) / self.device.flops_per_s


@dataclass(frozen=True)
class Needs:
    """What segments need, in bytes.

    forward  while forward is in a segment, beside what those before it keep
    begun    what is there when backward begins with a segment, beside what it and those before it keep: gradients
    work     the most that backward makes beside that while it is in a segment, by segment and rung
    tail     while the step is in the last segment, beside what those before it keep
    end      after backward, when nothing is kept any more
    """

    forward: tuple[int, ...]
    begun: tuple[int, ...]
    work: dict[tuple[int, str], int]
    tail: int
    end: int


def choices(ladder: Ladder, needs: Needs, offload: str) -> list[list[Choice]]:
    """For each segment the choices that begin with it; the last has one, to keep all.

    With `offload` auto what a run keeps may also wait in host memory, from `sac` on: what is cheap to do again would
    fill any host. With host all of it does.
    """
    found: list[list[Choice]] = []
    for at in range(ladder.last):
        runs = [(range(at, at + length), rung) for rung in ladder.rungs[at]
                for length in RUNS[: 1 if rung in ALONE else None] if at + length <= ladder.last]  # fmt: skip
        some = [(_run(ladder, needs, run, rung), run) for run, rung in runs
                if all(rung in ladder.rungs[other] for other in run)]  # fmt: skip
        here = [choice for choice, _ in some] if offload != "host" else []
        sent = [one for one in some if offload == "host" or offload == "auto" and ladder.sendable(*one)]
        found.append(here + [_away(ladder, *one) for one in sent])
    tail = frozenset(names(ladder.segments[-1].instrs))
    return [*found, [Choice(1, 0, needs.tail, 0.0, "all", tail)]]


def _run(ladder: Ladder, needs: Needs, run: range, rung: str) -> Choice:
    """Segments on a rung together: the boundary of the last is kept, the way to those of the others is run again."""
    boundary = frozenset(ladder.segments[run[-1]].boundary)
    everything, kept_bytes, held_bytes, seconds = set(boundary), 0, 0, 0.0
    most = needs.end if run[0] == 0 else 0
    for at in run:
        kept = ladder.rungs[at][rung] | {name for name in boundary if ladder.number[name] == at}
        part = ladder.part(at, kept, at != run[-1])
        again = held_bytes + needs.begun[at] if at != run[-1] else 0  # forward comes this way once more
        most = max(most, kept_bytes + again + needs.forward[at])
        kept_bytes += part.kept_bytes
        held_bytes += part.held_bytes
        seconds += part.seconds
        most = max(most, kept_bytes + held_bytes + needs.begun[at] + needs.work[at, rung])
        everything |= kept
    return Choice(len(run), kept_bytes, most, seconds, rung, frozenset(everything))


def _away(ladder: Ladder, choice: Choice, run: range) -> Choice:
    """A run whose kept values wait in host memory: they are there as it is worked on, and as much is under way.

    What the copies take longer than the work on the run, forward and back (twice that long), is waited for.
    """
    work = sum(ladder.seconds(instr) for at in run for instr in ladder.segments[at].instrs)
    copy = choice.kept_bytes / ladder.device.host_bytes_per_s
    waited = max(0.0, copy - work) + max(0.0, copy - 2 * work)
    needed_bytes = choice.needed_bytes + choice.kept_bytes
    return replace(choice, kept_bytes=0, needed_bytes=needed_bytes, seconds=choice.seconds + waited, on_host=True)


def names(instrs: Iterable[Instr]) -> list[str]:
    """Of the values that instructions make, in order."""
    return [out.name for instr in instrs for out in instr.values()]
