"""One list of instructions becomes the sections of a step; gradients that are partial sums are summed in the last.

    step                  forward        what the loss needs
      ...          ->     backward       the rest, takes grad_loss and what it reads of forward
                          sum_gradients  all_reduce(g1, g2, ...) in buckets
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.ir.program import Instr, Program, Ref, Section, Value
from autosp_aot.passes.step import Step

BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Sections:
    """Splits a step with gradients."""

    name: ClassVar[str] = "sections"

    def __call__(self, step: Step) -> Step:
        return step.with_program(split_sections(step.program))


@dataclass(frozen=True)
class OnlySection:
    """Names the section of a program that gives the loss alone."""

    name: ClassVar[str] = "section"

    def __call__(self, step: Step) -> Step:
        return step.with_program(only_section(step.program))


def only_section(program: Program) -> Program:
    """The section `step` of a program that gives the loss alone, as `evaluate`."""
    (step,) = program.sections
    return replace(program, sections=(replace(step, name="evaluate"),))


def split_sections(program: Program) -> Program:
    """Split the section `step` into `forward`, `backward` and `sum_gradients`."""
    (step,) = program.sections
    loss = dict(step.gives)["loss"]
    needed, forward = {loss}, set()
    for at in range(len(step.instrs) - 1, -1, -1):
        instr = step.instrs[at]
        if any(out.name in needed for out in instr.values()):
            forward.add(at)
            needed.update(instr.refs())
    first = tuple(instr for at, instr in enumerate(step.instrs) if at in forward)
    second = tuple(instr for at, instr in enumerate(step.instrs) if at not in forward)
    gradients = tuple((label, name) for label, name in step.gives if label != "loss")
    summed, gives = _sum_gradients(gradients, program.values())
    read = {name for name in (n for instr in second for n in instr.refs())} | {name for _, name in gradients}
    crossing = tuple(out.name for instr in first for out in instr.values() if out.name in read)
    taken = tuple(dict.fromkeys(name for _, name in gradients))
    sections = (
        Section("forward", (), first, (("loss", loss),)),
        Section("backward", crossing, second, gradients),
        Section("sum_gradients", taken, summed, gives),
    )
    return replace(program, sections=sections)


def _sum_gradients(gradients, values: dict[str, Value]) -> tuple[tuple[Instr, ...], tuple[tuple[str, str], ...]]:
    """All-reduces over buckets of equal dtype, in the order the gradients are given; whole gradients pass."""
    partial_sums = list(dict.fromkeys(name for _, name in gradients if values[name].placement.partial))
    instrs: list[Instr] = []
    totals: dict[str, str] = {}
    for bucket in _buckets([values[name] for name in partial_sums]):
        outs = tuple(
            replace(value, name=f"{value.name}.all_reduce", placement=replace(value.placement, partial=False))
            for value in bucket
        )
        instrs.append(Instr(outs, "all_reduce", tuple(Ref(v.name) for v in bucket)))
        totals.update((v.name, out.name) for v, out in zip(bucket, outs))
    return tuple(instrs), tuple((label, totals.get(name, name)) for label, name in gradients)


def _buckets(values: list[Value]) -> list[list[Value]]:
    buckets: dict[str, list[list[Value]]] = {}
    for value in values:
        lists = buckets.setdefault(value.dtype, [[]])
        if lists[-1] and sum(v.nbytes() for v in lists[-1]) + value.nbytes() > BUCKET_BYTES:
            lists.append([])
        lists[-1].append(value)
    return [bucket for lists in buckets.values() for bucket in lists]
