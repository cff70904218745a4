"""Wrong rewrites to plant into a program of all ranks, one at a time."""

from collections.abc import Callable
from dataclasses import replace

from autosp_aot.ir.operators import writer
from autosp_aot.ir.placement import Bounds, Placement
from autosp_aot.ir.program import Body, Dtype, Instr, PerRank, Program, Ref, rename
from autosp_aot.passes.release import release
from tests.edits import edit, named

Plant = Callable[[Program], Program]


def made(name: str) -> Callable[[Instr], bool]:
    """The instruction that makes a value."""
    return lambda instr: any(out.name == name for out in instr.values())


def planted(program: Program, plant: Plant) -> Program:
    """The program with a rewrite, and released anew: what is used later lives longer, and nothing is written into."""
    bare = replace(program, sections=tuple(replace(s, instrs=_bare(s.instrs)) for s in program.sections))
    return release(plant(bare))


def _bare(instrs: tuple[Instr, ...]) -> tuple[Instr, ...]:
    """Instructions of a section or body that release nothing and write into nothing."""
    body = lambda b: b and replace(b, instrs=_bare(b.instrs))  # noqa: E731
    return tuple(replace(instr, into=None, body=body(instr.body)) for instr in instrs if instr.op != "free")


# --- reductions and moves -----------------------------------------------------------------------------------------


def without(name: str) -> Plant:
    """A move is not there: what it moved is used in its place."""

    def plant(program: Program) -> Program:
        move = next(filter(made(name), program.instrs()))
        names = {out.name: ref for out, ref in zip(move.values(), move.refs())}
        return renamed(edit(program, made(name), lambda instr: []), names)

    return plant


def renamed(program: Program, names: dict[str, str]) -> Program:
    """Every use of a value is one of another."""
    name = lambda n: names.get(n, n)  # noqa: E731
    return replace(program, sections=tuple(
        replace(
            section,
            takes=tuple(dict.fromkeys(map(name, section.takes))),
            instrs=tuple(rename(instr, names) for instr in section.instrs),
            gives=tuple((label, name(given)) for label, given in section.gives),
        )
        for section in program.sections
    ))  # fmt: skip


def twice(wanted: Callable[[Instr], bool]) -> Plant:
    """A sum is summed again."""

    def plant(program: Program) -> Program:
        def again(instr: Instr) -> list[Instr]:
            first = tuple(replace(out, name=f"{out.name}.once") for out in instr.values())
            args = tuple(Ref(out.name) for out in first)
            return [replace(instr, outs=first), replace(instr, args=args)]

        return edit(program, wanted, again)

    return plant


def left_out_of_the_sum(program: Program) -> Program:
    """The last gradient of a bucket is not summed."""
    bucket = next(i for i in program.section("sum_gradients").instrs if i.op == "all_reduce")
    names = {bucket.values()[-1].name: bucket.refs()[-1]}
    shorter = lambda instr: [replace(instr, args=instr.args[:-1], outs=instr.outs[:-1])]  # noqa: E731
    return renamed(edit(program, lambda instr: instr is bucket, shorter), names)


def to(name: str, change: Callable[[Placement], Placement], op: str = "") -> Plant:
    """A value is moved to another placement."""

    def moved(instr: Instr) -> list[Instr]:
        out = instr.values()[0]
        return [replace(instr, op=op or instr.op, outs=(replace(out, placement=change(out.placement)),))]

    return lambda program: edit(program, made(name), moved)


def swapped_dims(placement: Placement) -> Placement:
    """Heads for positions."""
    return replace(placement, cut=replace(placement.cut, dim=3 - placement.cut.dim))


def bounds(change: Callable[[Bounds], Bounds]) -> Callable[[Placement], Placement]:
    return lambda placement: replace(placement, cut=replace(placement.cut, bounds=change(placement.cut.bounds)))


def copies_not_summed(program: Program) -> Program:
    """Each rank's gradient of a copy of a key/value head is taken for the whole of it."""

    def whole(instr: Instr) -> list[Instr]:
        return [replace(instr, outs=tuple(
            replace(out, placement=replace(out.placement, partial=False)) for out in instr.outs
        ))]  # fmt: skip

    program = edit(program, named("autosp.attention_backward"), whole)
    for _ in range(2):
        program = edit(program, named("reduce_scatter"), lambda instr: [replace(instr, op="all_to_all")])
    return program


def reordered(a: str, b: str) -> Plant:
    """What makes `a` comes after what makes `b`."""

    def plant(program: Program) -> Program:
        first = next(filter(made(a), program.instrs()))
        return edit(edit(program, made(a), lambda instr: []), made(b), lambda instr: [instr, first])

    return plant


def released_too_early(program: Program) -> Program:
    """A value is released one instruction before its last use."""
    section = program.section("forward")
    at = next(i for i, instr in enumerate(section.instrs) if instr.op == "free" and i > 3)
    instrs = (*section.instrs[: at - 1], section.instrs[at], section.instrs[at - 1], *section.instrs[at + 1 :])
    return program.with_section(replace(section, instrs=instrs))


def written_too_early(program: Program) -> Program:
    """A result is written into an operand that is read once more."""
    section, values = program.section("backward"), program.values()
    for at, instr in enumerate(section.instrs):
        later = {name for other in section.instrs[at + 1 :] if other.op != "free" for name in other.refs()}
        for place, name in enumerate(instr.refs()):
            operand, outs = values.get(name), instr.values()
            if writer(instr.op) and name in later and (operand.dtype, operand.shape) == (outs[0].dtype, outs[0].shape):
                instrs = (*section.instrs[:at], replace(instr, into=place), *section.instrs[at + 1 :])
                return program.with_section(replace(section, instrs=instrs))
    raise AssertionError("no operand is read once more")


# --- tiles --------------------------------------------------------------------------------------------------------


def in_tiles(result: str, change: Callable[[Body], Body]) -> Plant:
    """What the tiles that make `result` do is another."""
    changed = lambda instr: [replace(instr, body=change(instr.body))]  # noqa: E731
    return lambda program: edit(program, made(result), changed)


def results_swapped(a: str, b: str) -> Callable[[Body], Body]:
    """Two results of tiles in each other's place."""
    other = {a: b, b: a}
    return lambda body: replace(body, gives=tuple(other.get(name, name) for name in body.gives))


def reads(name: str, at: int, other: str) -> Callable[[Body], Body]:
    """A call of a tile reads another value."""

    def change(instr: Instr) -> Instr:
        return replace(instr, args=(*instr.args[:at], Ref(other), *instr.args[at + 1 :]))

    return lambda body: replace(body, instrs=tuple(change(i) if made(name)(i) else i for i in body.instrs))


# --- calls --------------------------------------------------------------------------------------------------------


def argument(wanted: Callable[[Instr], bool], at: int, change: Callable) -> Plant:
    """One argument of a call is another."""

    def changed(instr: Instr) -> list[Instr]:
        at_ = at % len(instr.args)
        return [replace(instr, args=(*instr.args[:at_], change(instr.args[at_]), *instr.args[at_ + 1 :]))]

    return lambda program: edit(program, wanted, changed)


def option(wanted: Callable[[Instr], bool], name: str, change: Callable) -> Plant:
    """One keyword argument of a call is another."""
    changed = lambda kwargs: tuple((key, change(old) if key == name else old) for key, old in kwargs)  # noqa: E731
    return lambda program: edit(program, wanted, lambda instr: [replace(instr, kwargs=changed(instr.kwargs))])


def on_rank(rank: int, by: int) -> Callable:
    """A number is `by` more on one rank."""

    def change(number: PerRank) -> PerRank:
        return PerRank(tuple(n + by * (r == rank) for r, n in enumerate(number.values)))

    return change


def operand(name: str, at: int, other: str) -> Plant:
    """A call reads another value."""
    return argument(made(name), at, lambda old: Ref(other))


def operands_swapped(name: str) -> Plant:
    """The first two operands in the other order."""
    swap = lambda instr: [replace(instr, args=(instr.args[1], instr.args[0], *instr.args[2:]))]  # noqa: E731
    return lambda program: edit(program, made(name), swap)


def call(name: str, op: str, *args) -> Plant:
    """A value is made by another call; an argument `%name` is a value."""
    refs = tuple(Ref(arg[1:]) if isinstance(arg, str) and arg[0] == "%" else arg for arg in args)
    return lambda program: edit(program, made(name), lambda i: [replace(i, op=op, args=refs, kwargs=())])


def narrowed(name: str, dtype: str) -> Plant:
    """A cast to a narrower dtype."""

    def plant(instr: Instr) -> list[Instr]:
        return [replace(instr, outs=(replace(instr.outs[0], dtype=dtype),), kwargs=(("dtype", Dtype(dtype)),))]

    return lambda program: edit(program, made(name), plant)
