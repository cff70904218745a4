"""Every value is released right after its last use, by an instruction.

    %b = f(%a)            %b = f(%a)
    %c = g(%b)     ->     free %a  ...
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.ir.program import Body, Instr, Program, Ref, Section
from autosp_aot.passes.step import Step


@dataclass(frozen=True)
class Release:
    """Releases values after their last use, in every section and body."""

    name: ClassVar[str] = "release"

    def __call__(self, step: Step) -> Step:
        return step.with_program(release(step.program))


def release(program: Program) -> Program:
    """Insert `free` after the last use of every value that is no input of the program and not taken later."""
    inputs = {entry.value.name for entry in program.inputs}
    later: set[str] = set()
    sections: list[Section] = []
    for section in reversed(program.sections):
        sections.append(_released(section, inputs | later | {name for _, name in section.gives}))
        later.update(section.takes)
    return replace(program, sections=tuple(reversed(sections)))


def _released(section: Section, lasting: set[str]) -> Section:
    instrs = tuple(instr if instr.body is None else _released_inside(instr, instr.body) for instr in section.instrs)
    return replace(section, instrs=_with_frees(instrs, section.takes, lasting))


def _released_inside(instr: Instr, body: Body) -> Instr:
    return replace(instr, body=replace(body, instrs=_with_frees(body.instrs, (), {*instr.refs(), *body.gives})))


def _with_frees(given: tuple[Instr, ...], takes: tuple[str, ...], lasting: set[str]) -> tuple[Instr, ...]:
    last_use: dict[str, int] = {name: -1 for name in takes}
    for at, instr in enumerate(given):
        for name in (*instr.refs(), *(out.name for out in instr.values())):
            last_use[name] = at
    dead: dict[int, list[str]] = {}
    for name, at in last_use.items():
        if name not in lasting:
            dead.setdefault(at, []).append(name)
    instrs: list[Instr] = []
    for at, made in enumerate((None, *given), start=-1):
        if made is not None:
            instrs.append(made)
        if at in dead:
            instrs.append(Instr((), "free", tuple(map(Ref, dead[at]))))
    return tuple(instrs)
