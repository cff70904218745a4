"""Programs with one thing changed."""

from collections.abc import Callable
from dataclasses import replace

from autosp_aot.ir.program import Instr, Program


def edit(program: Program, wanted: Callable[[Instr], bool], change: Callable[[Instr], list[Instr]]) -> Program:
    """The program with the first wanted instruction replaced; there has to be one."""
    for section in program.sections:
        for at, instr in enumerate(section.instrs):
            if wanted(instr):
                instrs = (*section.instrs[:at], *change(instr), *section.instrs[at + 1 :])
                return program.with_section(replace(section, instrs=instrs))
    raise AssertionError("no such instruction")


def named(op: str, part: str = "") -> Callable[[Instr], bool]:
    """Instructions of an operator, with `part` in the name of the first result."""
    return lambda instr: instr.op == op and part in (instr.values()[0].name if instr.values() else "")
