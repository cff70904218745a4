"""What backward reads of forward and was not saved is recomputed right before its first use.

    forward    h1 = ...                              kept: h1, q k v after their collectives, attention's results
               n = norm(h1); q = all_to_all(n @ Wq)
               o, lse = attention(q, k, v)
               h2 = h1 + all_to_all(o) @ Wo          kept: all_to_all(o), h2
    backward   recompute.n = norm(h1)                just before its first use, one segment at a time
               grad_Wq = recompute.n' @ grad_q

Where the boundary of a segment is not kept, the way to it leads through the segments before. What costs much there
(boundaries, attention, collectives) is held until its own segment is differentiated; all else is released on the way
and recomputed a second time then, as `recompute.recompute.n`. So is what is large and cheap, such as a norm in fp32,
where it is read before and after the gradient of an attention: tiles that make it twice need not hold it in between.

Method: checkpointing (Chen et al. 2016, arXiv:1604.06174) selective by operator cost (Korthikanti et al. 2022,
arXiv:2205.05198; AutoSP, ICLR 2026).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.ir.program import RECOMPUTED, Instr, Program, rename
from autosp_aot.ir.structure.table import meets
from autosp_aot.memory.costs import flops, heaviest
from autosp_aot.ops.table import is_quadratic, is_quadratic_gradient
from autosp_aot.passes.analysis.segments import Segment, numbered
from autosp_aot.passes.step import Step

# What is larger is not held over the gradient of an attention.
LARGE_BYTES = 2**27


@dataclass(frozen=True)
class Recompute:
    """Recomputes in backward what forward does not keep."""

    name: ClassVar[str] = "recompute"

    def __call__(self, step: Step) -> Step:
        return step.with_program(recompute(step.program, step.segments, step.kept))


def recompute(program: Program, segments: tuple[Segment, ...], kept: Collection[str]) -> Program:
    """Save the values of forward in `kept` for backward, and recompute the others there."""
    return _Recomputation(program, segments, kept).run()


def is_costly(op: str) -> bool:
    """Whether an instruction is not computed again as one among others, but for a choice of the plan."""
    return meets(op) or is_quadratic(op)


class _Recomputation:
    def __init__(self, program: Program, segments: tuple[Segment, ...], kept: Collection[str]):
        self.program, self.kept = program, kept
        self.made = {out.name: instr for instr in program.section("forward").instrs for out in instr.values()}
        self.segment = numbered(program, segments)
        self.held = {name for segment in segments for name in segment.boundary}
        self.held |= {name for name, instr in self.made.items() if is_costly(instr.op)}
        values, rank = program.values(), heaviest(program)
        self.passing = {
            out.name for instr in self.made.values() for out in instr.values()
            if out.nbytes(rank) > LARGE_BYTES and out.name not in self.held and not flops(instr, values, rank)
        }  # fmt: skip
        self.attentions = 0
        self.names: dict[tuple, str] = {}
        self.again: dict[str, int] = {}
        self.instrs: list[Instr] = []

    def run(self) -> Program:
        backward = self.program.section("backward")
        for instr in backward.instrs:
            self.instrs.append(rename(instr, {ref: self.present(ref, self.segment.get(ref)) for ref in instr.refs()}))
            self.attentions += is_quadratic_gradient(instr.op)
        gives = tuple((label, self.present(name, self.segment.get(name))) for label, name in backward.gives)
        read = {name for instr in self.instrs for name in instr.refs()} | {name for _, name in gives}
        takes = tuple(name for name in self.made if name in read)
        return self.program.with_section(replace(backward, takes=takes, instrs=tuple(self.instrs), gives=gives))

    def present(self, wanted: str, scope: int | None) -> str:
        """The name `wanted` has for segment `scope`; what is not there is computed again, operands first."""
        stack = [wanted]
        while stack:
            name = stack[-1]
            missing = [ref for ref in self.made[name].refs() if not self.there(ref, scope)] if name in self.made else []
            if self.there(name, scope) or not missing:
                stack.pop()
                if not self.there(name, scope):
                    self.compute(self.made[name], scope)
            else:
                stack.extend(reversed(missing))
        return self.name(wanted, scope)

    def there(self, name: str, scope: int | None) -> bool:
        return name not in self.made or name in self.kept or self.key(name, scope) in self.names

    def name(self, name: str, scope: int | None) -> str:
        return self.names.get(self.key(name, scope), name)

    def key(self, name: str, scope: int | None) -> tuple:
        """What is held, or is of no segment, is the same for all."""
        if name in self.held or name not in self.segment:
            return name, None
        return (name, scope, self.attentions) if name in self.passing else (name, scope)

    def compute(self, instr: Instr, scope: int | None) -> None:
        names = {ref: self.name(ref, scope) for ref in instr.refs()}
        first = instr.values()[0].name
        self.again[first] = self.again.get(first, 0) + 1
        prefix = RECOMPUTED * self.again[first]
        outs = tuple(out and replace(out, name=prefix + out.name) for out in instr.outs)
        self.instrs.append(replace(rename(instr, names), outs=outs))
        for out in instr.values():
            if out.name not in self.kept:
                self.names.setdefault(self.key(out.name, scope), prefix + out.name)
