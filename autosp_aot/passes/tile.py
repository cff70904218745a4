"""What is local along the sequence and too large is computed in slices of the sequence, one after the other.

    h [S, H], gate = silu(h @ Wg)           y, grad_W = tiles(h, Wg, Wd, grad) in 8
    y = gate @ Wd                    ->       tile.h = shard(h)                       a tile's rows
    ...                                       tile.gate = silu(tile.h @ Wg)           [S/8, I]
    grad_W = grad^T @ gate                    tile.grad_W = tile.grad^T @ tile.gate   a partial sum
                                            gives (tile.y, tile.grad_W)               joined, added up

A tile is a virtual rank executed sequentially: an instruction is local where its sharding rule, cut at every tile's
home, needs of operands the tile alone (or the whole of what is no sequence) and makes parts or partial sums of results.
Method: tiled MLP and loss (Arctic Long Sequence Training, arXiv:2506.13996), found by the rules for whatever is local.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

from autosp_aot.ir.operators import DTYPES, wide
from autosp_aot.ir.placement import PARTIAL, REPLICATE, Placement, inside, joined_tiles
from autosp_aot.ir.program import (
    TILE,
    Body,
    Input,
    Instr,
    Program,
    Ref,
    Section,
    Value,
    stands_for,
    with_refs,
)
from autosp_aot.ir.structure.table import STRUCTURE, TILES
from autosp_aot.memory.costs import peak_bytes
from autosp_aot.ops.table import spec_of
from autosp_aot.passes.analysis.labels import Labels
from autosp_aot.passes.release import release
from autosp_aot.passes.step import Step
from autosp_aot.sharding.local import Local
from autosp_aot.sharding.spec import Spec, Strategy

# What a region may hold beside what it reads and gives before `auto` slices it. As much as the partial sums it adds up
# may always be held: smaller tiles would spend more time on adding up than they save room.
LIMIT_BYTES = 2**30
# What is this many times smaller than the largest value of a run need not be sliced with it.
SMALL = 8


@dataclass(frozen=True)
class Tile:
    """Makes `tiles` slices: a number, `auto` (where much is held) or `off`; `target` is whose memory `auto` counts."""

    tiles: str | int
    target: str
    name: ClassVar[str] = "tile"

    def __call__(self, step: Step) -> Step:
        assert step.labels is not None, "the partition finds them"
        return step.with_program(tile(step.program, step.whole, step.labels, self.tiles, self.target))


def tile(program: Program, whole: Program, labels: Labels, tiles: str | int, target: str) -> Program:
    """Slice regions of every section: each into `tiles` slices, or (`auto`) those that hold too much."""
    if tiles == "off":
        return program
    rules = Rules(program, whole, labels, target)
    for section in program.sections:
        lasting = {n for other in program.sections for n in other.takes} | {n for _, n in section.gives}
        regions = runs(section, rules, tiles == "auto")
        needed = [lasting]
        for region in reversed(regions):
            needed.append(needed[-1].union(*(instr.refs() for instr in region.instrs)))
        instrs = [i for region, later in zip(regions, reversed(needed[:-1])) for i in region.cut(rules, later, tiles)]
        program = program.with_section(replace(section, instrs=tuple(instrs)))
    return program


@dataclass(frozen=True)
class _Placed:
    """A call of the whole step as tiles do it: its strategy, and where operands and results are."""

    origin: Instr
    strategy: Strategy
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]


class Rules:
    """Which calls can be done in tiles, and how."""

    def __init__(self, program: Program, whole: Program, labels: Labels, target: str):
        self.ranks, self.labels, self.values, self.target = program.ranks, labels, program.values(), target
        self.whole = whole.values()
        self.calls = {out.name: instr for instr in whole.instrs() for out in instr.values()}
        self.means = {entry.value.name: entry.value.name for entry in program.inputs}
        for instr in program.instrs():
            moved = instr.op in STRUCTURE
            names = [self.means[n] for n in instr.refs()] if moved else [stands_for(out.name) for out in instr.values()]
            self.means.update(zip((out.name for out in instr.values()), names))

        self.homes: dict[tuple, Placement | None] = {}
        self.found: dict[tuple, tuple[Spec, tuple | None]] = {}
        self.held: dict[tuple, int] = {}

    def home(self, name: str, tiles: int) -> Placement | None:
        """A value's tiles, where it is a sequence and at home."""
        key = self.labels.by_value.get(self.means[name]), self.values[name].placement, tiles
        if key not in self.homes:
            home, held = self.labels.home(self.means[name]), key[1]
            at_home = home is not None and (held == home or (self.ranks == 1 and held == REPLICATE))
            self.homes[key] = replace(self.labels, tiles=tiles).home(self.means[name]) if at_home else None
        return self.homes[key]

    def placed(self, instr: Instr, made: Mapping[str, Placement], tiles: int) -> _Placed | None:
        """How tiles do a call, `made` being what they have made before; None where it is not local."""
        if instr.op in STRUCTURE:
            return None
        origin = self.calls.get(stands_for(instr.values()[0].name))
        if origin is None or origin.op != instr.op:
            return None
        spec = spec_of(origin, [self.whole[name] for name in origin.refs()], self.ranks)
        if spec is None:
            return None
        outs = [out.name for out in instr.values()]
        homes = [self.home(name, tiles) for name in (*instr.refs(), *outs)]
        held = [self.values[name].placement for name in (*instr.refs(), *outs)]
        key = id(spec), *homes, *held, *(made.get(name) for name in instr.refs())
        if key not in self.found:
            self.found[key] = spec, self.strategy(instr, spec, homes, made)  # the key holds as long as the spec lives
        found = self.found[key][1]
        return None if found is None else _Placed(origin, *found)

    def strategy(self, instr: Instr, spec: Spec, homes: list[Placement | None], made: Mapping[str, Placement]):
        """A strategy that cuts something at home, of which tiles can have the operands and make the results."""
        tensors = zip((*spec.operands, *spec.results), homes)
        cuts = dict.fromkeys(spec.strategy_of(dims, home) for dims, home in tensors if home)
        for cut in cuts:
            found = spec.instantiate(cut) if cut and cut.factor is not None else None
            if found is not None and self.reads(instr, found[0], made) and self.gives(instr, found[1]):
                return cut, *found
        return None

    def reads(self, instr: Instr, wanted: Iterable[Placement], made: Mapping[str, Placement]) -> bool:
        """Every operand is there: as the tiles made it, a part of what the rank has, or whole."""
        for name, placement in zip(instr.refs(), wanted):
            held = self.values[name].placement
            if name in made:
                fits = placement == made[name] and not placement.partial
            else:
                fits = not placement.partial and not held.partial
                fits = fits and (held == placement == REPLICATE or inside(held, placement))
            if not fits:
                return False
        return True

    def gives(self, instr: Instr, results: Iterable[Placement]) -> bool:
        """What the tiles make are parts or partial sums of what the rank made."""
        summed = PARTIAL if self.ranks > 1 else REPLICATE
        return all(
            out.placement == (summed if placement == PARTIAL else joined_tiles(placement, self.ranks))
            for out, placement in zip(instr.values(), results)
        )

    def grows(self, instr: Instr, placed: _Placed) -> bool:
        """It makes partial sums larger than what they are made of: an embedding's gradient."""
        read = sum(self.values[n].nbytes() for n, placement in zip(instr.refs(), placed.operands) if placement.cut)
        return any(p == PARTIAL and out.nbytes() > read for out, p in zip(instr.values(), placed.results))


@dataclass
class Region:
    """Instructions in order: those that can be done in tiles, what comes before them, and what after.

    `made` are the members' results, `late` the names of what is known only when all tiles are done.
    """

    instrs: list[Instr] = field(default_factory=list)
    before: list[Instr] = field(default_factory=list)
    members: list[Instr] = field(default_factory=list)
    after: list[Instr] = field(default_factory=list)
    made: dict[str, Placement] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)

    def reaches(self, instr: Instr) -> bool:
        """A tile can have all that an instruction reads."""
        return self.late.isdisjoint(instr.refs())

    def touches(self, instr: Instr) -> bool:
        return not self.reaches(instr) or any(name in self.made for name in instr.refs())

    def add(self, instr: Instr, placed: "_Placed | None") -> None:
        """As a member, placed so; else where it has to stand."""
        self.instrs.append(instr)
        if placed is not None:
            self.members.append(instr)
            results = {out.name: placement for out, placement in zip(instr.values(), placed.results)}
            self.made |= results
            self.late.update(name for name, placement in results.items() if placement == PARTIAL)
        elif self.touches(instr):
            self.after.append(instr)
            self.late.update(out.name for out in instr.values())
        else:
            self.before.append(instr)

    def bring_forward(self, instr: Instr, rules: "Rules") -> bool:
        """Do before the tiles what `instr` waits for, and all of the run that this needs; False where that is large."""
        wanted = self.late.intersection(instr.refs())
        needed: list[Instr] = []
        for other in reversed(self.instrs):
            if other not in self.before and not wanted.isdisjoint(out.name for out in other.values()):
                needed.insert(0, other)
                wanted.update(other.refs())
        size = lambda found: max((rules.values[out.name].nbytes() for i in found for out in i.values()), default=0)  # noqa: E731
        if size(needed) * SMALL > size(self.members):
            return False
        names = {out.name for other in needed for out in other.values()}
        self.before += needed
        self.members = [other for other in self.members if other not in needed]
        self.after = [other for other in self.after if other not in needed]
        self.made = {name: placement for name, placement in self.made.items() if name not in names}
        self.late -= names
        return True

    def cut(self, rules: Rules, later: set[str], tiles: str | int) -> list[Instr]:
        """The instructions, the members as one loop over tiles where that pays; `later` is what is read after."""
        later = later.union(*(instr.refs() for instr in self.after))
        outs = [out for instr in self.members for out in instr.values() if out.name in later]
        count = tiles if isinstance(tiles, int) else self.tiles(rules, outs)
        count = min(count, self.longest(rules))
        loops = (self.loop(rules, outs, tried) for tried in _numbers(count, self.longest(rules)))
        loop = next((loop for loop in loops if loop), None) if count > 1 else None
        return [*self.before, loop, *self.after] if loop else self.instrs

    def tiles(self, rules: Rules, outs: list[Value]) -> int:
        """How many tiles keep what they hold within the limit; 1 where accumulating them would take as much."""
        held = self.held_bytes(rules, outs)
        summed = (out for out in outs if self.made[out.name] == PARTIAL)
        sums = sum(prod(out.whole_shape) * wide(DTYPES[out.dtype]).itemsize for out in summed)
        count = -(-held // max(LIMIT_BYTES, sums))
        return count if held - held // max(count, 1) > sums else 1

    def held_bytes(self, rules: Rules, outs: list[Value]) -> int:
        """The most that the members hold at a time beside what they read and give; of equal regions found once."""
        own = {out.name for instr in self.members for out in instr.values()}
        numbers: dict[str, int] = {}
        for instr in self.members:
            for name in (*instr.refs(), *(out.name for out in instr.values())):
                numbers.setdefault(name, len(numbers))
        inputs = [rules.values[name] for name in numbers if name not in own]
        calls = tuple(
            (instr.op, *(numbers[name] for name in instr.refs()), *((v.dtype, v.shape) for v in instr.values()))
            for instr in self.members
        )
        key = calls, tuple((v.dtype, v.shape) for v in inputs), tuple(numbers[out.name] for out in outs)
        if key not in rules.held:
            section = Section("step", (), tuple(self.members), tuple(("", out.name) for out in outs))
            program = Program(rules.ranks, tuple(Input("batch", value) for value in inputs), (section,))
            rules.held[key] = peak_bytes(release(program), rules.target) - sum(out.nbytes() for out in outs)
        return rules.held[key]

    def longest(self, rules: Rules) -> int:
        """The most tiles there can be: one a position of the rank with the fewest."""
        names = (name for instr in self.members for name in (*instr.refs(), *(out.name for out in instr.values())))
        cuts = (home.cut for name in names if (home := rules.home(name, 1)) and home.cut)
        return min((min(hi - lo for lo, hi in cut.bounds) for cut in cuts), default=0)

    def loop(self, rules: Rules, outs: list[Value], tiles: int) -> Instr | None:
        """The members as one instruction with a body; None where so many tiles would cut what is whole (a chunk)."""
        boxes = rules.ranks * tiles
        made: dict[str, Placement] = {}
        slices: dict[tuple[str, Placement], str] = {}
        read: dict[str, None] = {}
        body: list[Instr] = []

        def part(name: str, placement: Placement, instr: Instr) -> str:
            """What a tile reads of a value: its own, the whole, or a slice, made where it is first read."""
            if name in made:
                return TILE + name
            read[name] = None
            if placement.cut is None:
                return name
            if (name, placement) not in slices:
                again = sum(1 for other, _ in slices if other == name)
                slices[name, placement] = f"{TILE}{name}.{again}" if again else TILE + name
                out = local(name, placement, slices[name, placement])
                body.append(Instr((out,), "shard", (Ref(name),), (), instr.where))
            return slices[name, placement]

        def local(name: str, placement: Placement, called: str) -> Value:
            whole = rules.whole[rules.means[name]]
            return Value(called, whole.dtype, Local.shape(whole.shape, placement, boxes), placement)

        for instr in self.members:
            placed = rules.placed(instr, made, tiles)
            if placed is None:
                return None
            operands = [part(*pair, instr) for pair in zip(instr.refs(), placed.operands)]
            pairs = iter(placed.results)
            results = tuple(out and local(out.name, next(pairs), TILE + out.name) for out in instr.outs)
            call = with_refs(placed.origin, operands)
            body.append(replace(call, outs=results, args=self.arguments(rules, placed, call, boxes)))
            made.update((out.name, placement) for out, placement in zip(instr.values(), placed.results))
        gives = tuple(TILE + out.name for out in outs)
        return Instr(tuple(outs), TILES, tuple(map(Ref, read)), body=Body(tiles, tuple(body), gives))

    def arguments(self, rules: Rules, placed: _Placed, call: Instr, boxes: int) -> tuple:
        """The arguments of the whole step's call, sizes and positions being a tile's."""
        spec = spec_of(placed.origin, [rules.whole[name] for name in placed.origin.refs()], rules.ranks)
        if spec is None or spec.localize is None:
            return call.args
        shape = lambda name, p: Local.shape(rules.whole[name].shape, p, boxes)  # noqa: E731
        shapes = [shape(name, p) for name, p in zip(placed.origin.refs(), placed.operands)]
        results = [shape(out.name, p) for out, p in zip(placed.origin.values(), placed.results)]
        return spec.localize(call.args, Local(placed.strategy, shapes, results))


def _numbers(count: int, most: int) -> Iterator[int]:
    """Numbers of tiles to try: the one that is wanted, then powers of two, above it and below."""
    powers = [2**at for at in range(1, most.bit_length()) if 2**at != count]
    yield count
    yield from (power for power in powers if power > count)
    yield from reversed([power for power in powers if power < count])


def runs(section: Section, rules: Rules, sparing: bool) -> list[Region]:
    """A section's instructions in runs: a run ends before a local one that needs what must come after the run's.

    What is not local and needs nothing of the run comes before it, however late it stands; all other comes after. What
    a local one needs is brought forward where all of it is small, such as a count of tokens.
    """
    regions = [Region()]
    for instr in section.instrs:
        region = regions[-1]
        placed = rules.placed(instr, region.made, 2) if region.reaches(instr) else None
        if placed is None and region.touches(instr) and rules.placed(instr, {}, 2):
            if not region.bring_forward(instr, rules):
                regions.append(region := Region())
            placed = rules.placed(instr, region.made, 2) if region.reaches(instr) else None
        if placed is not None and sparing and rules.grows(instr, placed):
            placed = None
        region.add(instr, placed)
    return regions
