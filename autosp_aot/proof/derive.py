"""The static proof that a partitioned program is equivalent to the unsharded one: every line is derived from the rules.

Each value of a rank's program stands for one value of the unsharded program, with a placement. Inputs stand for
themselves; a move keeps what a value stands for and must be legal between its placements; a call must be the unsharded
program's call of that operator on what its operands stand for, under a strategy its rule allows, with the arguments
that follow.

    whole     %h = aten.mul.Tensor(%x, %w)
    ranks     %h @ Shard(1) = aten.mul.Tensor(%x @ Shard(1), %w @ Replicate)        derived: cut factor 1 of 3

No numbers are computed: a missing or doubled sum, a swapped dim, a shifted position or a changed size is found by name.
"""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from functools import lru_cache

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.placement import PARTIAL, REPLICATE, Placement, disjoint, joined_tiles, local_shape
from autosp_aot.ir.program import (
    EARLY,
    Arg,
    Body,
    Input,
    Instr,
    Int,
    PerRank,
    Program,
    Ref,
    Value,
    at_rank,
    per_rank,
    stands_for,
)
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ops.rescale import RESCALE
from autosp_aot.ops.table import spec_of
from autosp_aot.sharding.homogeneous import homogeneous
from autosp_aot.sharding.local import Local, Shape
from autosp_aot.sharding.spec import Spec, Strategy

Placements = tuple[Placement, ...]


def derive(program: Program, whole: Program, ranks: Iterable[int] | None = None) -> None:
    """Raise ArtifactError (`placement-wrong`) at the first line of `program` that does not follow from `whole`.

    `ranks` are those whose numbers are checked, all by default.
    """
    _Derivation(program, whole, tuple(range(program.ranks) if ranks is None else ranks)).run()


class _Derivation:
    def __init__(self, program: Program, whole: Program, ranks: tuple[int, ...]):
        self.program, self.ranks, self.boxes = program, ranks, program.ranks
        self.whole_values = whole.values()
        self.whole_shapes = {name: value.sizes for name, value in self.whole_values.items()}
        self.calls = {out.name: instr for instr in whole.instrs() for out in instr.values()}
        self.whole_gives = dict(whole.sections[0].gives)
        self.whole_inputs = {entry.value.name: entry for entry in whole.inputs}
        self.stands_for: dict[str, str] = {}
        self.placements: dict[str, Placement] = {}
        self.early: set[str] = set()

    def run(self) -> None:
        if set(map(_whole_name, self.program.inputs)) != set(self.whole_inputs):
            raise _wrong("the inputs are not those of the unsharded program")
        for entry in self.program.inputs:
            name = _whole_name(entry)
            wanted = self.whole_inputs[name]
            if entry.kind == "guess" and wanted.kind == "tangent":
                self.early.add(entry.value.name)
                wanted = Input("guess", replace(wanted.value, name=EARLY + name))
            if entry != wanted:
                raise _wrong(f"input {entry.value.name} is not the unsharded program's")
            self.know(entry.value, name)
        for section in self.program.sections:
            for instr in section.instrs:
                self.instr(instr)
        self.results()

    def instr(self, instr: Instr) -> None:
        if instr.body is not None:
            self.tiles(instr, instr.body)
        elif (record := STRUCTURE.get(instr.op)) is not None:
            if record.fits is not None:
                self.move(instr, record.fits)
        elif instr.op == RESCALE.name:
            self.rescale(instr)
        else:
            self.call(instr)

    def know(self, value: Value, meaning: str) -> None:
        self.stands_for[value.name] = meaning
        self.placements[value.name] = value.placement

    def tiles(self, instr: Instr, body: Body) -> None:
        """A body is derived as the program is, with tiles for ranks; its parts and partial sums make up the results."""
        scope, tiles = copy(self), body.tiles
        scope.stands_for = {name: self.stands_for[name] for name in instr.refs()}
        scope.placements = {name: self.placements[name] for name in instr.refs()}
        scope.early = self.early.intersection(instr.refs())
        scope.ranks = tuple(rank * tiles + tile for rank in self.ranks for tile in range(tiles))
        scope.boxes = self.boxes * tiles
        for inner in body.instrs:
            scope.instr(inner)
        for name, out in zip(body.gives, instr.values()):
            made = joined_tiles(scope.placements[name], self.boxes)
            if scope.placements[name] == PARTIAL:
                made = PARTIAL if self.boxes > 1 else REPLICATE
            if made != out.placement:
                what = f"the tiles' {name}, {_said(scope.placements[name])}, does not make up {out.name}"
                raise _wrong(what, instr, f"which is {_said(out.placement)}")
            self.check_value(out, scope.stands_for[name], instr)
            self.know(out, scope.stands_for[name])
            if name in scope.early:
                self.early.add(out.name)

    def rescale(self, instr: Instr) -> None:
        """What was computed with a guess of the tangent becomes what it is with the tangent."""
        name, tangent, guess = instr.refs()
        (out,) = instr.values()
        meanings = [self.whole_inputs.get(self.stands_for[n]) for n in (tangent, guess)]
        if name not in self.early or guess not in self.early or tangent in self.early or meanings[0] != meanings[1]:
            raise _wrong(f"{name} cannot be rescaled by {tangent} and {guess}", instr)
        if meanings[0] is None or meanings[0].kind != "tangent" or out.placement != self.placements[name]:
            raise _wrong(f"{out.name} is not {name}, rescaled by the loss's tangent", instr)
        self.check_value(out, self.stands_for[name], instr)
        self.know(out, self.stands_for[name])

    def move(self, instr: Instr, fits: Callable[[Placement, Placement], bool]) -> None:
        for name, out in zip(instr.refs(), instr.values()):
            if name in self.early:
                self.early.add(out.name)
            source, target = self.placements[name], out.placement
            if not fits(source, target):
                raise _wrong(f"{instr.op} cannot take {name} from {_said(source)} to {_said(target)}", instr)
            self.check_value(out, self.stands_for[name], instr)
            self.know(out, self.stands_for[name])

    def call(self, instr: Instr) -> None:
        first = stands_for(instr.values()[0].name)
        origin = self.calls.get(first)
        if origin is None or origin.op != instr.op:
            raise _wrong(f"the unsharded program has no {instr.op} that makes {first}", instr)
        means = [self.stands_for[name] for name in instr.refs()]
        if means != origin.refs():
            why = f"in the unsharded program from {', '.join(origin.refs())}"
            raise _wrong(f"{first} is computed from {', '.join(means)}", instr, why)
        outs = [out and stands_for(out.name) for out in instr.outs]
        if outs != [out and out.name for out in origin.outs]:
            raise _wrong(f"the results of {instr.op} are {outs}", instr)
        operands = tuple(self.placements[name] for name in instr.refs())
        results = tuple(out.placement for out in instr.values())
        strategy, spec = self.strategy(origin, operands, results, instr)
        early = tuple(at for at, name in enumerate(instr.refs()) if name in self.early)
        if early and not homogeneous(origin, spec, early):
            raise _wrong(f"{first} is not homogeneous in what is computed with a guess of the tangent", instr)
        for out in instr.values():
            self.check_value(out, stands_for(out.name), instr)
            self.know(out, stands_for(out.name))
            if early:
                self.early.add(out.name)
        self.check_arguments(instr, origin, spec, strategy, operands, results)

    def strategy(
        self, origin: Instr, operands: Placements, results: Placements, instr: Instr
    ) -> tuple[Strategy, Spec | None]:
        """The strategy of the rule that has exactly these placements."""
        wholes = [self.whole_values[name] for name in origin.refs()]
        spec = spec_of(origin, wholes, self.program.ranks)
        if spec is None:
            if any(p != REPLICATE for p in (*operands, *results)):
                raise _wrong(f"{instr.op} has no rule, so all it reads and makes is Replicate", instr)
            return Strategy(), None
        strategy = _strategy(spec, operands, results)
        if strategy is not None:
            return strategy, spec
        said = ", ".join(_said(p) for p in operands)
        raise _wrong(f"{instr.op} of ({said}) does not give {', '.join(_said(p) for p in results)}", instr,
                     "no strategy of its sharding rule has these placements")  # fmt: skip

    def check_value(self, value: Value, meaning: str, instr: Instr) -> None:
        dtype, shape = self.whole_values[meaning].dtype, self.whole_shapes[meaning]
        if value.dtype != dtype:
            raise _wrong(f"{value.name} is {value.dtype}", instr, f"in the unsharded program it is {dtype}")
        rank = _misfit(value.shape, shape, value.placement, self.ranks)
        if rank is not None:
            expected = local_shape(shape, value.placement, rank)
            raise _wrong(f"{value.name} has another shape than rank {rank}'s box {list(expected)}", instr)

    def check_arguments(
        self,
        instr: Instr,
        origin: Instr,
        spec: Spec | None,
        strategy: Strategy,
        operands: Placements,
        results: Placements,
    ) -> None:
        args = origin.args
        if spec is not None and spec.localize is not None and strategy.factor is not None:
            shapes = [self.local(name, p) for name, p in zip(origin.refs(), operands)]
            made = [self.local(out.name, p) for out, p in zip(origin.values(), results)]
            args = spec.localize(args, Local(strategy, shapes, made))
        found, expected = (instr.args, instr.kwargs), (args, origin.kwargs)
        if not _equal(found, expected, self.ranks):
            rank = next(rank for rank in self.ranks if not _equal(found, expected, (rank,)))
            what = f"an argument of {instr.op} is wrong on rank {rank}"
            raise _wrong(what, instr, "it does not follow from the placements")

    def local(self, name: str, placement: Placement) -> Shape:
        return Local.shape(self.whole_shapes[name], placement, self.boxes)

    def results(self) -> None:
        """Loss and gradients are the unsharded program's, whole on every rank at the end."""
        given: dict[str, str] = {}
        for section in self.program.sections:
            if len(dict(section.gives)) != len(section.gives):
                raise _wrong(f"section {section.name} gives one label twice")
            for label, name in section.gives:
                wanted = self.whole_gives.get(label)
                if name in self.early:
                    raise _wrong(f"{label} is {name}, computed with a guess of the tangent")
                if self.stands_for[name] != wanted:
                    raise _wrong(f"{label} is {self.stands_for[name]}, in the unsharded program {wanted}")
            given |= dict(section.gives)
        if set(given) != set(self.whole_gives):
            odd = sorted(set(given) ^ set(self.whole_gives))
            raise _wrong(f"the program gives {odd} more or less than the unsharded program")
        for label, name in given.items():
            last = self.program.sections[-1].name == "sum_gradients"
            if self.placements[name] != REPLICATE and (last or label == "loss"):
                what = f"{label} is {_said(self.placements[name])} at the end of the step"
                raise _wrong(what, why="a reduction is missing")


def _whole_name(entry: Input) -> str:
    """The name of the unsharded program's input that an input, or a guess of it, is."""
    return entry.value.name.removeprefix(EARLY if entry.kind == "guess" else "")


@lru_cache(maxsize=4096)
def _misfit(shape: tuple[Int, ...], whole: tuple[int, ...], placement: Placement, ranks: tuple[int, ...]) -> int | None:
    """The first rank whose box has another shape; the first of all where the boxes are not those of the whole."""
    cut = placement.cut
    if cut is not None and cut.outer * max(hi for _, hi in cut.bounds) != whole[cut.dim]:
        return ranks[0]
    boxes = ((rank, local_shape(whole, placement, rank)) for rank in ranks)
    return next((rank for rank, box in boxes if tuple(at_rank(n, rank) for n in shape) != box), None)


@lru_cache(maxsize=8192)
def _strategy(spec: Spec, operands: Placements, results: Placements) -> Strategy | None:
    """The strategy of a rule that has exactly these placements; None where none has."""
    partial = tuple(at for at, placement in enumerate(operands) if placement.partial)
    found = [Strategy(partial=partial)]
    for dims, placement in zip((*spec.operands, *spec.results), (*operands, *results)):
        if placement.cut is not None and (cut := spec.strategy_of(dims, placement)):
            found.append(replace(cut, partial=partial))
    return next((strategy for strategy in found if spec.instantiate(strategy) == (operands, results)), None)


def _equal(a: Arg, b: Arg, ranks: tuple[int, ...]) -> bool:
    """Whether arguments are the same on `ranks`, whatever operands are called (those were compared before)."""
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all([_equal(x, y, ranks) for x, y in zip(a, b)])
    if isinstance(a, PerRank) or isinstance(b, PerRank):
        a, b = (per_rank(tuple(n.values[r] for r in ranks)) if isinstance(n, PerRank) else n for n in (a, b))
    return type(a) is type(b) and (isinstance(a, Ref) or repr(a) == repr(b))


def _said(placement: Placement) -> str:
    if placement.cut is None:
        return "Partial" if placement.partial else "Replicate"
    kind = "Shard" if disjoint(placement.cut.bounds) else "copies"
    return f"{kind}({placement.cut.dim}{', partial' if placement.partial else ''})"


def _wrong(what: str, instr: Instr | None = None, why: str = "") -> ArtifactError:
    line = ""
    if instr is not None:
        line = f"{', '.join(out.name for out in instr.values())} = {instr.op}(...)"
        line += f" ({instr.where.source})" if instr.where.source else ""
    return ArtifactError(Problem("placement-wrong", what, line, why, "build the artifact again"))
