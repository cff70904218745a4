"""Operators that work element by element, with broadcasting."""

from autosp_aot.ir.operators import elementwise
from autosp_aot.sharding.call import Call
from autosp_aot.sharding.spec import Axis, Spec

# Sets of operands that may be partial sums together: the operator is linear in them.
LINEAR = {
    "aten.add.Tensor": ((0, 1),),
    "aten.sub.Tensor": ((0, 1),),
    "aten.neg.default": ((0,),),
    "aten.mul.Tensor": ((0,), (1,)),
    "aten.mul.Scalar": ((0,),),
    "aten.div.Tensor": ((0,),),
    "aten.div.Scalar": ((0,),),
}
WIDENING = {("bf16", "f32"), ("f16", "f32"), ("bf16", "f64"), ("f16", "f64"), ("f32", "f64")}


def pointwise(call: Call) -> Spec | None:
    return broadcast(call) if elementwise(call.instr.op) else None


def broadcast(call: Call) -> Spec | None:
    """Every dim of the result is parallel; a dim of size one that is broadcast has no factor."""
    if len({out.shape for out in call.results}) != 1:
        return None
    shape = call.results[0].shape
    result = tuple((Axis(dim),) for dim in range(len(shape)))
    operands = []
    for value in call.operands:
        skipped = len(shape) - len(value.shape)
        operands.append(
            tuple(
                () if size == 1 and shape[dim + skipped] != 1 else (Axis(dim + skipped),)
                for dim, size in enumerate(value.shape)
            )
        )
    return Spec(shape, frozenset(), tuple(operands), (result,) * len(call.results), linear=_linear(call))


def _linear(call: Call) -> tuple[tuple[int, ...], ...]:
    op, operands = call.instr.op, call.operands
    if op == "aten._to_copy.default":
        return ((0,),) if (operands[0].dtype, call.results[0].dtype) in WIDENING else ()
    return tuple(at for at in LINEAR.get(op, ()) if max(at) < len(operands))
