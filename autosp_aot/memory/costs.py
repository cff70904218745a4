"""What a program costs, read off its text: bytes alive over time, bytes moved, floating operations.

Storage is counted, not names: a view shares its operand's storage, which lives until the last of its names is released.
"""

from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass
from math import prod

from torch import Tensor

from autosp_aot.ir.operators import wide
from autosp_aot.ir.program import ITEMSIZE, RECOMPUTED, TILE, Body, Instr, PerRank, Program, Value, at_rank, values_of
from autosp_aot.ir.structure.table import FREE, STRUCTURE, meets, to_host
from autosp_aot.ir.transfers import received_bytes, storage_bytes
from autosp_aot.memory.layouts import Layouts
from autosp_aot.memory.rank_classes import unlike_ranks
from autosp_aot.ops.record import Demand
from autosp_aot.ops.table import OURS


@dataclass(frozen=True, slots=True)
class Moment:
    """One instruction, by its section and first result (or operator): bytes alive after it, and the most meanwhile.

    Counted are storages of values that are no inputs, each once; `peak_bytes` also buffers and kernels' workspace.
    """

    section: str
    name: str
    alive_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Moved:
    """Collectives of one kind in one section: how many, and the bytes that the worst rank receives."""

    section: str
    op: str
    count: int
    received_bytes: int


@dataclass(frozen=True)
class Costs:
    """Of the rank with the highest peak. Parameters and optimizer state are not in it.

    `host_bytes` is the pool of what waits in host memory, `host_moved_bytes` what goes there and comes back.
    """

    peak_bytes: int
    peak_at: str
    kept_bytes: int
    flops: int
    recomputed_flops: int
    moved: tuple[Moved, ...]
    host_bytes: int
    host_moved_bytes: int


def costs(program: Program, target: str, copying: bool = False) -> Costs:
    """The costs of a program of all ranks on a target (cpu, cuda, rocm); `copying` as for `Layouts`."""
    rank, moments = highest(program, target, copying)
    worst = max(moments, key=lambda moment: moment.peak_bytes, default=Moment("forward", "", 0, 0))
    kept = next((moment.alive_bytes for moment in reversed(moments) if moment.section == "forward"), 0)
    values = program.values()
    flops: Counter[bool] = Counter()
    for instr in (instr for section in program.sections for instr in section.instrs):
        for again, count in _products(instr, values, rank):
            flops[again] += count
    peak_at = f"{worst.section}: {worst.name}"
    return Costs(
        worst.peak_bytes, peak_at, kept, flops[False] + flops[True], flops[True], tuple(moved(program)),
        pool_bytes(program, rank),
        sum(instr.values()[0].nbytes(rank) for instr in program.instrs()
            if instr.op in STRUCTURE and STRUCTURE[instr.op].starts),
    )  # fmt: skip


def pool_bytes(program: Program, rank: int) -> int:
    """The host memory that a rank's values take: where the last place in the pool ends."""
    places = [(instr.args[-1], instr.values()[0]) for instr in program.instrs() if to_host(instr.op)]
    return max((at + value.nbytes(rank) for at, value in places), default=0)


def heaviest(program: Program) -> int:
    """The rank whose values have the most bytes in all: likely, before it is known when each is alive, the highest."""
    shapes = Counter((value.shape, value.dtype) for value in program.values().values())
    kinds = [(Value("", dtype, shape), count) for (shape, dtype), count in shapes.items()]
    return max(range(program.ranks), key=lambda rank: sum(value.nbytes(rank) * count for value, count in kinds))


def highest(program: Program, target: str, copying: bool = False) -> tuple[int, list[Moment]]:
    """The rank with the highest peak, and its curve."""
    curves = ((rank, curve(program, rank, target, copying)) for rank in unlike_ranks(program))
    return max(curves, key=lambda entry: max((moment.peak_bytes for moment in entry[1]), default=0))


def peak_bytes(program: Program, target: str) -> int:
    """The highest peak of any rank, beside inputs."""
    return max((moment.peak_bytes for moment in highest(program, target)[1]), default=0)


def curve(program: Program, rank: int, target: str, copying: bool = False) -> list[Moment]:
    """The memory of rank `rank` at each instruction, in order. Raises ArtifactError for one that cannot be done."""
    storages = Storages(program, rank, target, copying)
    return [storages.step(instr, section.name) for section in program.sections for instr in section.instrs]


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A storage: the value it was made for, its bytes, and the moments of the curve at which it is alive."""

    value: Value
    nbytes: int
    moments: range


def lifetimes(program: Program, rank: int, target: str) -> list[Lifetime]:
    """Every storage of rank `rank` in the order they are made; values that share one are in it once. No inputs."""
    storages = Storages(program, rank, target)
    born: dict[str, tuple[Value, int, int]] = {}
    found: dict[str, Lifetime | None] = {}  # in the order they are made, None while they are alive
    at = 0
    for section in program.sections:
        for instr in section.instrs:
            storages.step(instr, section.name)
            for out in instr.values():
                if out.name in storages.bytes:
                    born[out.name] = out, storages.bytes[out.name], at
                    found[out.name] = None
            if instr.op == FREE:
                for name in [name for name in born if name not in storages.bytes]:
                    value, nbytes, start = born.pop(name)
                    found[name] = Lifetime(value, nbytes, range(start, at))
            at += 1
    found.update((name, Lifetime(value, nbytes, range(start, at))) for name, (value, nbytes, start) in born.items())
    return [life for life in found.values() if life is not None]


def storages(program: Program, rank: int, target: str) -> dict[str, str]:
    """By name, the value that each value's storage was made for; "" for inputs'. `program` has no `free` yet."""
    found = Storages(program, rank, target)
    for section in program.sections:
        for instr in section.instrs:
            found.step(instr, section.name)
    return found.owner


def alive(program: Program, rank: int, at: int, target: str) -> list[tuple[Value, int]]:
    """The values alive after instruction `at` of rank `rank` and the bytes of their storages, the largest first.

    Values that share a storage are one entry, the first of them. Inputs are not in it.
    """
    found = [(life.value, life.nbytes) for life in lifetimes(program, rank, target) if at in life.moments]
    return sorted(found, key=lambda entry: -entry[1])


def moved(program: Program) -> list[Moved]:
    """The traffic of each kind of collective in each section."""
    values = program.values()
    counts: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    for section in program.sections:
        for instr in section.instrs:
            if meets(instr.op):
                key = section.name, instr.op
                counts[key] += 1
                pairs = zip(instr.refs(), instr.values())
                received[key] += sum(received_of(values[name], values[out.name], program.ranks) for name, out in pairs)
    return [Moved(*key, counts[key], received[key]) for key in counts]


def received_of(source: Value, target: Value, ranks: int) -> int:
    return received_bytes(source.placement, target.placement, source.whole_shape, ITEMSIZE[source.dtype], ranks)


class Storages:
    """The storages that are alive, each under the name of the value it was made for, and the names that lie in it."""

    def __init__(self, program: Program, rank: int, target: str, copying: bool = False):
        self.layouts, self.box, self.count = Layouts(program.ranks, target, copying), rank, 1
        self.values: MutableMapping[str, Value] = program.values()
        self.tensors = {entry.value.name: self.layouts.of(entry.value, rank) for entry in program.inputs}
        self.owner = dict.fromkeys(self.tensors, "")
        self.users: Counter[str] = Counter()
        self.bytes: dict[str, int] = {}
        self.total = 0

    def step(self, instr: Instr, section: str) -> Moment:
        if instr.op == FREE:
            before = self.total
            for name in instr.refs():
                self.release(name)
            return Moment(section, instr.op, self.total, before)
        if instr.body is not None:
            return self.tiles(instr, instr.body, section)
        made = self.layouts.made(instr, self.tensors, self.values, self.box, self.count)
        owners = [self.owner[name] for name in instr.refs()] + [out.name if out else "" for out in instr.outs]
        for out, result, owner in zip(instr.outs, made.results, made.owners):
            if out is not None and result is not None:
                self.add(out.name, result, "" if to_host(instr.op) else owners[owner])
        return Moment(section, instr.values()[0].name, self.total, self.total + made.workspace_bytes)

    def unmet(self, instr: Instr) -> dict[int, Demand]:
        """What the kernel of a call demands of operands that does not hold, by place."""
        return self.layouts.unmet(instr, self.tensors, self.box)

    def tiles(self, instr: Instr, body: Body, section: str) -> Moment:
        """Room for all results, sums in a wide dtype; a tile after the other; then each sum in its own dtype."""
        before, made, rooms = self.total, values_of(body.instrs), []
        for out, name in zip(instr.values(), body.gives):
            tensor = self.layouts.of(out, self.box)
            self.add(out.name, tensor, out.name)
            dtype = wide(tensor.dtype) if made[name].placement.partial else tensor.dtype
            rooms.append((tensor.numel() * dtype.itemsize, 0 if dtype == tensor.dtype else storage_bytes(tensor)))
        most = room = sum(count for count, _ in rooms)
        for tile in self.distinct(body, made):
            inside = self.inside(instr, body, made, tile)
            most = max(most, room + max(inside.step(inner, section).peak_bytes for inner in body.instrs))
        for count, converted in rooms:
            most = max(most, room + converted)
            room += converted - count if converted else 0
        return Moment(section, instr.values()[0].name, self.total, before + most)

    def distinct(self, body: Body, made: dict[str, Value]) -> list[int]:
        """A tile of each size."""
        numbers = [n for value in made.values() for n in value.shape if isinstance(n, PerRank)]
        first = self.box * body.tiles
        sizes = {tuple(n.values[first + tile] for n in numbers): tile for tile in reversed(range(body.tiles))}
        return sorted(sizes.values())

    def inside(self, instr: Instr, body: Body, made: dict[str, Value], tile: int) -> "Storages":
        """Where a tile begins: with what its body reads, which is counted outside."""
        inside = copy(self)
        inside.box, inside.count, inside.total = self.box * body.tiles + tile, body.tiles, 0
        inside.values = ChainMap(made, self.values)
        inside.tensors = {name: self.tensors[name] for name in instr.refs()}
        inside.owner, inside.users, inside.bytes = dict.fromkeys(instr.refs(), ""), Counter(), {}
        return inside

    def add(self, name: str, tensor: Tensor, owner: str) -> None:
        self.tensors[name], self.owner[name] = tensor, owner
        self.users[owner] += 1
        if owner == name:
            self.bytes[name] = storage_bytes(tensor)
            self.total += self.bytes[name]

    def release(self, name: str) -> None:
        owner = self.owner.pop(name)
        del self.tensors[name]
        self.users[owner] -= 1
        if owner and not self.users[owner]:
            self.total -= self.bytes.pop(owner)


def flops(instr: Instr, values: Mapping[str, Value], rank: int) -> int:
    """The FLOPs of an instruction on a rank, of all its tiles together; `values` are the program's."""
    return sum(count for _, count in _products(instr, values, rank))


def _products(instr: Instr, values: Mapping[str, Value], rank: int) -> Iterator[tuple[bool, int]]:
    """Whether a call is a recomputation, and its FLOPs on a rank."""
    calls, tiles = (instr.body.instrs, instr.body.tiles) if instr.body else ((instr,), 1)
    own = values_of(calls) if instr.body else {}
    for call in calls:
        if call.op in FLOPS or (call.op in OURS and OURS[call.op].flops):
            again = call.values()[0].name.removeprefix(TILE).startswith(RECOMPUTED)
            for box in range(rank * tiles, (rank + 1) * tiles):
                places = [(own[name], box) if name in own else (values[name], rank) for name in call.refs()]
                places += [(out, box if instr.body else rank) for out in call.values()]
                yield again, _flops(call, [tuple(at_rank(n, at) for n in v.shape) for v, at in places])


def _flops(instr: Instr, shapes: list[tuple[int, ...]]) -> int:
    """Multiplications and additions of the products in a call; all else is linear and small beside them.

    `shapes` are those of its operands, then of its results.
    """
    count = len(instr.refs())
    read, made = shapes[:count], shapes[count:]
    own = OURS[instr.op].flops if instr.op in OURS else None
    return FLOPS[instr.op](instr, read, made) if own is None else own(read, dict(instr.kwargs))


def _product(instr: Instr, read: list[tuple[int, ...]], made: list[tuple[int, ...]]) -> int:
    """Of the last two operands: [..., M, K] and [..., K, N], or [M, K] and [K]."""
    a, b = read[-2:]
    return 2 * prod(a) * (b[-1] if len(b) > 1 else 1)


def _convolution(instr: Instr, read: list[tuple[int, ...]], made: list[tuple[int, ...]]) -> int:
    """Of y with a weight [outputs, inputs / groups, *kernel]: that many products for each element of y.

    Transposed, the weight is [inputs, outputs / groups, *kernel], and it is each element of x that has them.
    """
    x, weight = read[:2]
    transposed = instr.args[6]
    return 2 * prod(x if transposed else made[0]) * prod(weight[1:])


def _convolution_backward(instr: Instr, read: list[tuple[int, ...]], made: list[tuple[int, ...]]) -> int:
    """As many as forward has for each of the gradients of x and of the weight that are made."""
    grad, x, weight = read[:3]
    transposed, wanted = instr.args[7], instr.args[10]
    assert isinstance(wanted, tuple), "output_mask"
    return 2 * prod(x if transposed else grad) * prod(weight[1:]) * sum(map(bool, wanted[:2]))


FLOPS = {
    "aten.addmm.default": _product,
    "aten.baddbmm.default": _product,
    "aten.bmm.default": _product,
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
    "aten.dot.default": _product,
    "aten.mm.default": _product,
    "aten.mv.default": _product,
}
