"""Elementwise results are written into operands that end there.

    %s = aten.silu.default(%g)              %s = aten.silu.default(%g, into=%g)
    free(%g)                        ->      free(%g)
    %y = aten.mul.Tensor(%s, %u)            %y = aten.mul.Tensor(%s, %u, into=%s)
    free(%s)                                free(%s)

Where element by element the same place is read and written, the numbers are the same. The operand has the result's
dtype and layout in memory, all of it, and nobody reads it again by any name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from autosp_aot.ir.aliasing import Aliases
from autosp_aot.ir.operators import writer
from autosp_aot.ir.program import Instr, Program, followed, values_of
from autosp_aot.ir.structure.table import FREE
from autosp_aot.memory.costs import Storages, heaviest
from autosp_aot.passes.step import Step


@dataclass(frozen=True)
class Reuse:
    """Writes results into operands, by the layouts that kernels of `target` make."""

    target: str
    name: ClassVar[str] = "reuse"

    def __call__(self, step: Step) -> Step:
        return step.with_program(reuse(step.program, self.target))


def reuse(program: Program, target: str) -> Program:
    """Write results `into` operands wherever that is legal; `program` has every `free`."""
    aliases = Aliases(entry.value.name for entry in program.inputs)
    found = _Reuse(Storages(program, heaviest(program), target), aliases)
    return replace(program, sections=tuple(replace(s, instrs=found.run(s.instrs)) for s in program.sections))


def writable(instr: Instr, tensors: Mapping[str, Tensor]) -> list[int]:
    """The operands with the layout of the result of `instr`, by place: it may be written into one that ends."""
    if writer(instr.op) is None:
        return []
    made = tensors[instr.values()[0].name]
    return [at for at, name in enumerate(instr.refs()) if tensors[name] is made]


class _Reuse:
    def __init__(self, storages: Storages, aliases: Aliases):
        self.storages, self.aliases = storages, aliases

    def run(self, instrs: tuple[Instr, ...]) -> tuple[Instr, ...]:
        found = []
        for instr, after in followed(instrs):
            if instr.body is not None:
                tile = self.storages.inside(instr, instr.body, values_of(instr.body.instrs), 0)
                inside = _Reuse(tile, self.aliases.copy())
                instr = replace(instr, body=replace(instr.body, instrs=inside.run(instr.body.instrs)))
            self.storages.step(instr, "")
            if instr.op == FREE:
                self.aliases.release(instr.refs())
            else:
                instr = replace(instr, into=self.into(instr, after))
                self.aliases.make(instr)
            found.append(instr)
        return tuple(found)

    def into(self, instr: Instr, after: Instr | None) -> int | None:
        """The first operand that the result may be written into."""
        released = after.refs() if after is not None and after.op == FREE else []
        for at in writable(instr, self.storages.tensors):
            name, (out,) = instr.refs()[at], instr.values()
            alike = self.storages.values[name].shape == out.shape
            if alike and name in released and self.aliases.ends(instr, name, released):
                return at
        return None
