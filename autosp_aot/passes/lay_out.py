"""Copies of what lies in memory otherwise than the kernel of an operator reads it.

    %q: f32[B, N, S, D]                               its dim D is not the innermost in memory
    %out, %lse = autosp.attention(%q, ...)
      ->
    %q.relayout = relayout(%q, [0, 2, 1, 3])          [B, S, N, D] in memory
    %out, %lse = autosp.attention(%q.relayout, ...)

What a kernel demands is in the record of its operator (`ops/record.py`). Later readers of a section that demand a copy
of a value read the same one.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.ir.program import Arg, Instr, Program, Ref, rename, values_of
from autosp_aot.ir.structure.moves import RELAYOUT
from autosp_aot.memory.costs import Storages
from autosp_aot.memory.rank_classes import unlike_ranks
from autosp_aot.ops.table import OURS
from autosp_aot.passes.step import Step


@dataclass(frozen=True)
class LayOut:
    """Copies what the kernels of `target` read otherwise, on any rank."""

    target: str
    name: ClassVar[str] = "lay-out"

    def __call__(self, step: Step) -> Step:
        return step.with_program(lay_out(step.program, self.target))


def lay_out(program: Program, target: str) -> Program:
    """The program with a copy of each operand that a kernel cannot read where it lies."""
    if not any(instr.op in OURS and OURS[instr.op].demands for instr in program.instrs()):
        return program
    ranks = [Storages(program, rank, target) for rank in unlike_ranks(program)]
    sections = []
    for section in program.sections:
        copies: dict[str, str] = {}  # by what they are copies of
        instrs: list[Instr] = []
        for instr in section.instrs:
            made, instr = _demanded(instr, ranks, copies) if instr.body is None else _in_tiles(instr, ranks, copies)
            for one in (*made, instr):
                for storages in ranks:
                    storages.values.update((out.name, out) for out in one.values())
                    storages.step(one, section.name)
                instrs.append(one)
        sections.append(replace(section, instrs=tuple(instrs)))
    return replace(program, sections=tuple(sections))


def _in_tiles(instr: Instr, ranks: list[Storages], copies: dict[str, str]) -> tuple[list[Instr], Instr]:
    """The same for a body: what it reads from outside is copied outside, once for all tiles."""
    assert instr.body is not None, "tiles have a body"
    inside = [storages.inside(instr, instr.body, values_of(instr.body.instrs), 0) for storages in ranks]
    outside: dict[str, str] = {}
    made, instrs, own = [], [], dict[str, str]()
    for inner in instr.body.instrs:
        copied, inner = _demanded(inner, inside, own)
        for at, one in enumerate(copied):
            (name,), (out,) = one.refs(), one.values()
            if name in instr.refs():
                outside[name] = own[name] = copies.setdefault(name, out.name)
                inner = rename(inner, {out.name: own[name]})
                copied[at] = replace(one, outs=(replace(out, name=own[name]),))
                made += [copied[at]] if own[name] == out.name else []
        for one in (*copied, inner):
            instrs += [] if one.op == RELAYOUT.name and one.refs()[0] in outside else [one]
            for storages in inside:
                storages.values.update((out.name, out) for out in one.values())
                storages.step(one, "")
    args = tuple(Ref(name) for name in (*instr.refs(), *outside.values()))
    return made, replace(instr, args=args, body=replace(instr.body, instrs=tuple(instrs)))


def _demanded(instr: Instr, ranks: list[Storages], copies: dict[str, str]) -> tuple[list[Instr], Instr]:
    """The copies to be made before a call, and the call that reads them."""
    found = {at: demand for storages in ranks for at, demand in storages.unmet(instr).items()}
    made, args = [], list[Arg](instr.args)
    for at, demand in found.items():
        ref = args[at]
        assert isinstance(ref, Ref), "a demand is of a tensor"
        if ref.name not in copies:
            name = f"{ref.name}.relayout"
            again = f"{name}_{sum(other.startswith(name) for other in ranks[0].values) + 1}"
            out = replace(ranks[0].values[ref.name], name=again if name in ranks[0].values else name)
            copies[ref.name] = out.name
            made.append(Instr((out,), RELAYOUT.name, (ref, demand.order), where=instr.where))
        args[at] = Ref(copies[ref.name])
    return made, replace(instr, args=tuple(args)) if found else instr
