"""Which values may stay partial sums to the end of the step: those from which only gradients follow, linearly.

    g = mm(x^T, grad)        x and grad cut along rows: g is a partial sum on every rank
    h = permute(g)           grad.w is h, summed in the last section at no further cost: g, h
    y = bmm(decay, states)   read by forward: a partial sum of it would have to be reduced right away
"""

from autosp_aot.ir.program import Program
from autosp_aot.ops.table import spec_of


def summed_last(program: Program, ranks: int) -> set[str]:
    """Names of those values of a whole program (one section `step`)."""
    (step,) = program.sections
    values = program.values()
    gradients = {name for label, name in step.gives if label != "loss"}
    others = {name for label, name in step.gives if label == "loss"}
    for instr in reversed(step.instrs):
        last = all(out.name in gradients and out.name not in others for out in instr.values())
        spec = spec_of(instr, [values[name] for name in instr.refs()], ranks) if last else None
        linear = {at for operands in spec.linear for at in operands} if spec else set()
        for at, name in enumerate(instr.refs()):
            (gradients if at in linear else others).add(name)
    return gradients - others
