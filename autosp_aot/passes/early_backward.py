"""The gradient of the loss is computed with the loss, while the logits are there: in the tiles that make them.

    forward    logits = h @ W                          [S, V], the peak
               loss = cross_entropy(logits)
    backward   grad_logits = f(logits, grad_loss)      reads the logits: they are saved or recomputed
               grad_h, grad_W = ...

    forward    logits = h @ W; loss = ...
               early.grad_logits = f(logits, early.grad_loss)
               early.grad_h, early.grad_W = ...
    backward   grad_h = rescale(early.grad_h, grad_loss, early.grad_loss)

What is computed early assumes a loss scale, `early.grad_loss`, and is rescaled by the real tangent: it has
to be homogeneous in it. Method: fused loss (Arctic Long Sequence Training, arXiv:2506.13996; Liger Kernel,
arXiv:2410.10989).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.ir.program import EARLY, Input, Instr, Program, Ref, Value, rename, values_of
from autosp_aot.ir.structure.table import STRUCTURE, meets
from autosp_aot.ops.rescale import RESCALE
from autosp_aot.ops.table import is_quadratic, spec_of
from autosp_aot.passes.analysis.labels import Labels
from autosp_aot.passes.analysis.segments import alive_after
from autosp_aot.passes.step import Step
from autosp_aot.passes.tile import LIMIT_BYTES, Region, Rules, runs
from autosp_aot.sharding.homogeneous import homogeneous


@dataclass(frozen=True)
class EarlyBackward:
    """Begins backward early for `tiles` slices: a number, `auto` or `off`; `target` is whose memory `auto` counts."""

    tiles: str | int
    target: str
    name: ClassVar[str] = "early"

    def __call__(self, step: Step) -> Step:
        assert step.labels is not None, "the partition finds them"
        return step.with_program(compute_early(step.program, step.whole, step.labels, self.tiles, self.target))


def compute_early(program: Program, whole: Program, labels: Labels, tiles: str | int, target: str) -> Program:
    """Move the beginning of backward to the end of forward, where tiles of the loss can then do both.

    Nothing is moved where `tiles` is off, where it would save little (with `auto`), where tiles cannot do both, or
    where what is moved is not homogeneous in the loss's tangent.
    """
    tangent = next((entry.value for entry in program.inputs if entry.kind == "tangent"), None)
    if tiles == "off" or tangent is None:
        return program
    rules = Rules(program, whole, labels, target)
    first, heavy = _beginning(program, rules, tangent.name, LIMIT_BYTES if tiles == "auto" else 1)
    names = _scaled(first, whole, tangent.name)
    if not first or names is None:
        return program
    early = _moved(program, first, names, tangent)
    regions = runs(early.section("forward"), Rules(early, whole, labels, target), tiles == "auto")
    return early if _done_together(regions, heavy) else program


def _moved(program: Program, first: list[Instr], names: dict[str, str], tangent: Value) -> Program:
    """The program with `first` at the end of forward; what scales with the tangent is rescaled as backward begins."""
    forward, backward = program.section("forward"), program.section("backward")
    made = values_of(first).keys()
    later = [instr for instr in backward.instrs if made.isdisjoint(out.name for out in instr.values())]
    given = {name for _, name in backward.gives}
    read = given.union(*(instr.refs() for instr in later))
    guess = replace(tangent, name=names[tangent.name])
    rescaled = [
        Instr((out,), RESCALE.name, (Ref(names[out.name]), Ref(tangent.name), Ref(guess.name)), where=instr.where)
        for instr in first for out in instr.values() if out.name in read and out.name in names
    ]  # fmt: skip
    instrs = (*rescaled, *later)
    crossing = given.union(*(instr.refs() for instr in instrs))
    ahead = (*forward.instrs, *(_renamed(instr, names) for instr in first))
    takes = tuple(name for name in values_of(ahead) if name in crossing)
    program = replace(program, inputs=(*program.inputs, Input("guess", guess)))
    program = program.with_section(replace(forward, instrs=ahead))
    return program.with_section(replace(backward, takes=takes, instrs=instrs))


def _done_together(regions: list[Region], heavy: set[str]) -> bool:
    """Only the tiles that make what is heavy read it."""
    for region in regions:
        for instr in region.instrs:
            own = region.made.keys() if instr in region.members else ()
            if any(name in heavy and name not in own for name in instr.refs()):
                return False
    return True


def _beginning(program: Program, rules: Rules, tangent: str, worth_bytes: int) -> tuple[list[Instr], set[str]]:
    """What of backward comes back to as little as carries the forward pass before the loss; nothing where none does.

    Forward is followed from its last mixing of positions on: where least is alive before most is, and that most, which
    has to be worth it. What follows from the tangent is followed to where, after its most, no more is alive than that
    least. With it come the names of forward's values after the least that are larger. Only what is a sequence counts.
    """
    forward, backward = program.section("forward").instrs, program.section("backward").instrs
    start = max((at for at, instr in enumerate(forward) if _mixes(instr)), default=0)
    alive = _alive_bytes(forward, rules)
    most = max(range(start, len(alive)), key=alive.__getitem__, default=start)
    least = min(range(start, most), key=lambda at: (alive[at], -at), default=most)
    if not alive or alive[most] - alive[least] < worth_bytes:
        return [], set()
    later = values_of(forward[least + 1 :]).values()
    heavy = {value.name for value in later if value.nbytes() > alive[least] and rules.home(value.name, 1)}
    chain = _following(backward, tangent)
    end = next((at for at, instr in enumerate(chain) if _mixes(instr)), len(chain))
    after = _alive_bytes(chain, rules)[:end]
    most = max(range(end), key=after.__getitem__, default=0)
    count = next((at + 1 for at in range(most, end) if after[at] <= alive[least]), 0)
    return _needed(backward, chain[:count]), heavy


def _following(instrs: Iterable[Instr], name: str) -> list[Instr]:
    """What depends on a value."""
    names, found = {name}, []
    for instr in instrs:
        if not names.isdisjoint(instr.refs()):
            found.append(instr)
            names.update(out.name for out in instr.values())
    return found


def _needed(instrs: Sequence[Instr], wanted: Iterable[Instr]) -> list[Instr]:
    """These instructions with all of `instrs` that they depend on, in order."""
    names, found = {out.name for instr in wanted for out in instr.values()}, []
    for instr in reversed(instrs):
        if not names.isdisjoint(out.name for out in instr.values()):
            names.update(instr.refs())
            found.append(instr)
    return found[::-1]


def _alive_bytes(instrs: Sequence[Instr], rules: Rules) -> list[int]:
    """Bytes of the sequences that these instructions made and will read again, after each."""
    sequences = {name: value.nbytes() for name, value in values_of(instrs).items() if rules.home(name, 1)}
    return [sum(sequences[name] for name in names) for names in alive_after(instrs, sequences)]


def _scaled(instrs: Iterable[Instr], whole: Program, tangent: str) -> dict[str, str] | None:
    """Early names of what scales with the tangent, the tangent among them; None where something does otherwise."""
    names = {tangent: EARLY + tangent}
    calls = {out.name: instr for instr in whole.instrs() for out in instr.values()}
    values = whole.values()
    for instr in instrs:
        scaled = tuple(at for at, name in enumerate(instr.refs()) if name in names)
        if not scaled:
            continue
        origin = calls.get(instr.values()[0].name)
        if origin is not None:
            spec = spec_of(origin, [values[name] for name in origin.refs()], 1)
            if not homogeneous(origin, spec, scaled):
                return None
        names |= {out.name: EARLY + out.name for out in instr.values()}
    return names


def _renamed(instr: Instr, names: dict[str, str]) -> Instr:
    """The instruction with operands and results renamed."""
    outs = tuple(out and replace(out, name=names.get(out.name, out.name)) for out in instr.outs)
    return replace(rename(instr, names), outs=outs)


def _mixes(instr: Instr) -> bool:
    """Whether positions of the sequence come together in an instruction; partial sums of all have none any more."""
    return (meets(instr.op) and STRUCTURE[instr.op].operands == 1) or is_quadratic(instr.op)
