"""What a pass makes of a program, both as text."""

from autosp_aot.ir.text import parse_program, print_program
from autosp_aot.passes.step import Pass, Step


def parsed(text: str, constants: dict[str, tuple[int, ...]] | None = None) -> Step:
    """A step whose unsharded program and program of all ranks are the same text."""
    program = parse_program(text, constants or {})
    return Step(program, program, {})


def after(run: Pass, step: Step) -> str:
    return print_program(run(step).program)[0]
