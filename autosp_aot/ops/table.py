"""The operators of our own, all of them, and what is known of any operator: ours by its record, ATen's by torch."""

from functools import lru_cache

from autosp_aot.ir.operators import overload
from autosp_aot.ir.program import Instr, Ref, Value, map_args
from autosp_aot.ops.attention import operators as attention
from autosp_aot.ops.experts import operators as experts
from autosp_aot.ops.rescale import RESCALE
from autosp_aot.ops.uniform import UNIFORM
from autosp_aot.sharding.call import Call, Whole
from autosp_aot.sharding.pointwise import pointwise
from autosp_aot.sharding.spec import Spec
from autosp_aot.sharding.table import RULES

ALL = (
    attention.ATTENTION,
    attention.ATTENTION_BACKWARD,
    attention.ATTENTION_ROWS,
    attention.ATTENTION_ROWS_BACKWARD,
    attention.ATTENTION_ROWS_VECTOR_GRADIENT,
    attention.ATTENTION_VECTOR_GRADIENT,
    experts.EXPERT_MM,
    experts.EXPERT_MM_WEIGHT_GRAD,
    RESCALE,
    UNIFORM,
)
OURS = {op.name: op for op in ALL}


def schema(name: str) -> str | None:
    """The signature of an allowed operator; None for one that is not."""
    if name in OURS:
        return OURS[name].signature
    found = overload(name)
    return None if found is None else str(found._schema)


def spec_of(instr: Instr, operands: list[Value], ranks: int) -> Spec | None:
    """The rule of a call over whole shapes; None for an operator that has none (it computes replicated)."""
    anonymous = tuple(Value("", v.dtype, v.shape) for v in operands)
    outs = tuple(out and Value("", out.dtype, out.shape) for out in instr.outs)
    bare = Instr(outs, instr.op, map_args(instr.args, _blank), map_args(instr.kwargs, _blank))
    return _spec(bare, anonymous, ranks)


def is_quadratic(name: str) -> bool:
    """Whether an operator's work grows with the square of the sequence."""
    return name in OURS and OURS[name].quadratic


def is_quadratic_gradient(name: str) -> bool:
    """Whether an operator makes the gradients of a quadratic one."""
    return name in {op.gradient for op in ALL if op.quadratic}


def _blank(leaf):
    return Ref("") if isinstance(leaf, Ref) else leaf


@lru_cache(maxsize=4096)
def _spec(instr: Instr, operands: tuple[Value, ...], ranks: int) -> Spec | None:
    read, made = (tuple(Whole(v.dtype, v.sizes) for v in values) for values in (operands, instr.values()))
    rule = OURS[instr.op].rule if instr.op in OURS else RULES.get(instr.op, pointwise)
    return rule and rule(Call(instr, read, made, ranks))
