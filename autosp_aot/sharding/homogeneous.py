"""In which operands a call is homogeneous: scaled in them by a factor, its results are scaled by it, up to rounding.

    mul(g, x)    tanh_backward(g, out)    mm(g, w)    sum(g)    cast(g)         in g
    add(g, h)                                                                   in g and h together
"""

from autosp_aot.ir.operators import overload
from autosp_aot.ir.program import Instr
from autosp_aot.sharding.spec import Spec


def homogeneous(instr: Instr, spec: Spec | None, operands: tuple[int, ...]) -> bool:
    """True where the call with this rule is homogeneous in the operands at these places, the others staying."""
    if spec is not None and operands in spec.linear:
        return True
    if operands != (0,):
        return False
    if instr.op == "aten._to_copy.default":
        return all(out.dtype[0] in "fb" and out.dtype != "b8" for out in instr.values())
    return instr.op == "aten.masked_fill.Scalar" and instr.args[2] == 0 or _vector_jacobian_product(instr.op)


def _vector_jacobian_product(op: str) -> bool:
    """What ATen calls a backward is linear in the gradient it is given first."""
    found = overload(op)
    if found is None or not found._schema.name.endswith(("_backward", "_backward_data")):
        return False
    return found._schema.arguments[0].name.startswith("grad")
