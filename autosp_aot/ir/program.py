"""The form all stages share: sections of instructions over named, typed and placed values.

A program describes all ranks at once. Where the ranks differ (a local size, a start) the number is a `PerRank`;
`Program.for_rank` fills in one rank's numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeGuard

from autosp_aot.ir.placement import REPLICATE, Placement

ITEMSIZE = {
    "f64": 8, "f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "b8": 1,
}  # fmt: skip


# What the name of a recomputed value begins with; the rest is the name of the recomputed value.
RECOMPUTED = "recompute."
# The same for a value of a tile; the rest is the name of the value it is a part or a partial sum of.
TILE = "tile."

# The same for a value computed with a guess of the loss's tangent, before backward.
EARLY = "early."


def free_of_prefixes(name: str) -> str:
    """A name for a value of the unsharded program that none of the prefixes above begins, whatever a module is called.

    No module has an empty name, so `.early.0.mm` is no other value's.
    """
    return f".{name}" if name.startswith((RECOMPUTED, TILE, EARLY)) else name


@dataclass(frozen=True, slots=True)
class PerRank:
    """An integer that differs between ranks: `values[r]` is rank r's."""

    values: tuple[int, ...]


Int = int | PerRank
# An argument of a call: a Ref, Dtype, PerRank, number, string or None, or a tuple of arguments. Which of them it is, an
# operator's schema says, which no type checker reads.
Arg = Any
Args = tuple[Arg, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of a value."""

    name: str


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype as an argument, by its short name (`f32`)."""

    name: str


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: its dtype, the shape of a rank's box, and the placement that says which box."""

    name: str
    dtype: str
    shape: tuple[Int, ...]
    placement: Placement = REPLICATE

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole of which a rank holds a box."""
        cut, sizes = self.placement.cut, tuple(at_rank(n, 0) for n in self.shape)
        if cut is None:
            return sizes
        extent = max(hi for _, hi in cut.bounds)
        return (*sizes[: cut.dim], cut.outer * extent, *sizes[cut.dim + 1 :])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape in a program whose ranks do not differ: an unsharded one, or one rank's."""
        assert _numbers(self.shape), self.name
        return self.shape

    def nbytes(self, rank: int = 0) -> int:
        """Bytes of rank `rank`'s box."""
        return prod(at_rank(n, rank) for n in self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Where:
    """Where an instruction came from: the user's `file.py:line` and the module path."""

    source: str = ""
    module: str = ""


@dataclass(frozen=True, slots=True)
class Instr:
    """One operator call. `outs` has an entry for each result of the operator, None where nobody uses it.

    A `tiles` instruction has a `body`, and as `args` every outer value that the body reads. The result of one with
    `into` is written into the memory of an operand, that many places after the first of `refs`.
    """

    outs: tuple[Value | None, ...]
    op: str
    args: Args = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()
    where: Where = Where()
    body: "Body | None" = None
    into: int | None = None
    _refs: tuple[str, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def refs(self) -> list[str]:
        """Names of the tensor operands in the order they appear, repeats included."""
        refs = self._refs
        if refs is None:  # found once: passes ask over and over
            leaves = flatten((self.args, tuple(value for _, value in self.kwargs)))
            refs = tuple(leaf.name for leaf in leaves if isinstance(leaf, Ref))
            object.__setattr__(self, "_refs", refs)
        return list(refs)

    def values(self) -> list[Value]:
        return [out for out in self.outs if out is not None]


@dataclass(frozen=True, slots=True)
class Body:
    """What a `tiles` instruction does once for each of its tiles, one after the other.

    `gives` names, for each result of the instruction, what a tile makes of it: a part, or a partial sum of it. Tiles
    are virtual ranks executed sequentially: boxes and `PerRank` numbers are those of ranks x tiles, rank r's tile t at
    r * tiles + t. Values made in a body are known in it alone.
    """

    tiles: int
    instrs: tuple[Instr, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """What a program is given.

    Its kind is `parameter`, `buffer`, `batch`, `tangent`, `seed` (where the step draws) or `guess` (of the tangent).
    """

    kind: str
    value: Value


@dataclass(frozen=True, slots=True)
class Section:
    """A named run of instructions. `takes` are values made by earlier sections, `gives` are (label, value name)."""

    name: str
    takes: tuple[str, ...]
    instrs: tuple[Instr, ...]
    gives: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """One step, whole (`ranks` = 1) or of every rank."""

    ranks: int
    inputs: tuple[Input, ...]
    sections: tuple[Section, ...]

    def instrs(self) -> Iterator[Instr]:
        """Every instruction in order, those of a body after the instruction it belongs to."""
        return instrs_of(self.sections)

    def values(self) -> dict[str, Value]:
        """Every value by name, those of bodies left out."""
        table = {entry.value.name: entry.value for entry in self.inputs}
        for section in self.sections:
            table.update(values_of(section.instrs))
        return table

    def section(self, name: str) -> Section:
        return next(section for section in self.sections if section.name == name)

    def with_section(self, section: Section) -> "Program":
        """The program with the section of that name replaced."""
        return replace(self, sections=tuple(section if s.name == section.name else s for s in self.sections))

    def for_rank(self, rank: int) -> "Program":
        """The program of one rank: every `PerRank` is its number; in bodies, its numbers of all tiles."""

        def own(n: PerRank) -> Int:
            tiles = len(n.values) // self.ranks
            return per_rank(n.values[rank * tiles : (rank + 1) * tiles])

        return map_ints(self, own)


def instrs_of(sections: Iterable[Section]) -> Iterator[Instr]:
    """Every instruction of sections in order, those of a body after the instruction it belongs to."""
    for section in sections:
        for instr in section.instrs:
            yield instr
            if instr.body is not None:
                yield from instr.body.instrs


def followed(instrs: tuple[Instr, ...]) -> Iterator[tuple[Instr, Instr | None]]:
    """Every instruction with the one after it; None after the last."""
    return zip(instrs, (*instrs[1:], None))


def values_of(instrs: Iterable[Instr]) -> dict[str, Value]:
    """The values that instructions make, by name."""
    return {out.name: out for instr in instrs for out in instr.values()}


def stands_for(name: str) -> str:
    """The name of the value that a value of a tile, a recomputed or an early one stands for."""
    name = name.removeprefix(TILE)
    while name.startswith(RECOMPUTED):
        name = name.removeprefix(RECOMPUTED)
    return name.removeprefix(EARLY)


def at_rank(n: Int, rank: int) -> int:
    return n.values[rank] if isinstance(n, PerRank) else n


def per_rank(values: tuple[int, ...]) -> Int:
    """A `PerRank`, or the plain number where the ranks agree."""
    return values[0] if len(set(values)) == 1 else PerRank(values)


def _numbers(shape: tuple[Int, ...]) -> TypeGuard[tuple[int, ...]]:
    return not any([type(n) is PerRank for n in shape])


def flatten(arg: Arg) -> Iterator[Arg]:
    """The leaves of nested argument tuples and lists, in order."""
    if isinstance(arg, (tuple, list)):
        for item in arg:
            yield from flatten(item)
    else:
        yield arg


def map_args(arg: Arg, change: Callable[[Arg], Arg]) -> Arg:
    """The same nesting with `change` applied to every leaf."""
    if isinstance(arg, (tuple, list)):
        return tuple([map_args(item, change) if isinstance(item, (tuple, list)) else change(item) for item in arg])
    return change(arg)


def with_refs(instr: Instr, names: list[str]) -> Instr:
    """The instruction with its operands, in order of appearance, replaced by these names."""
    left = iter(names)
    change = lambda leaf: Ref(next(left)) if isinstance(leaf, Ref) else leaf  # noqa: E731
    return replace(instr, args=map_args(instr.args, change), kwargs=map_args(instr.kwargs, change))


def rename(instr: Instr, names: dict[str, str]) -> Instr:
    """The instruction with operands replaced by name, in its body too; names that are not in the table stay."""
    change = lambda leaf: Ref(names.get(leaf.name, leaf.name)) if isinstance(leaf, Ref) else leaf  # noqa: E731
    body = instr.body and replace(instr.body, instrs=tuple(rename(inner, names) for inner in instr.body.instrs))
    return replace(instr, args=map_args(instr.args, change), kwargs=map_args(instr.kwargs, change), body=body)


def map_ints(program: Program, change: Callable[[PerRank], Int]) -> Program:
    """The program with `change` applied to every `PerRank` of a shape or an argument."""
    return replace(
        program,
        inputs=tuple(replace(entry, value=_map_value(entry.value, change)) for entry in program.inputs),
        sections=tuple(replace(s, instrs=tuple(map_instr(i, change) for i in s.instrs)) for s in program.sections),
    )


def map_instr(instr: Instr, change: Callable[[PerRank], Int]) -> Instr:
    """The instruction with `change` applied to every `PerRank` of a shape or an argument; itself where it has none."""
    if instr.body is None and next(numbers_by_rank(instr), None) is None:
        return instr
    leaf = lambda arg: change(arg) if isinstance(arg, PerRank) else arg  # noqa: E731
    outs = tuple(out and _map_value(out, change) for out in instr.outs)
    body = instr.body and replace(instr.body, instrs=tuple(map_instr(i, change) for i in instr.body.instrs))
    return replace(instr, outs=outs, args=map_args(instr.args, leaf), kwargs=map_args(instr.kwargs, leaf), body=body)


def numbers_by_rank(instr: Instr) -> Iterator[PerRank]:
    """The numbers of an instruction in which ranks, or tiles, differ; those of a body left out."""
    shapes = (n for out in instr.outs if out is not None for n in out.shape)
    for leaf in (*shapes, *flatten((instr.args, instr.kwargs))):
        if type(leaf) is PerRank:
            yield leaf


def _map_value(value: Value, change: Callable[[PerRank], Int]) -> Value:
    if _numbers(value.shape):
        return value
    return replace(value, shape=tuple(change(n) if isinstance(n, PerRank) else n for n in value.shape))
