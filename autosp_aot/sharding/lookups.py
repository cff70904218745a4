"""Operators that read or write at positions given by a tensor: gather, scatter, index.

    gather(x, 2, at):        x: [b, s, V]   at: [b, s, k]                    -> [b, s, k]
    scatter(x, 2, at, y):    x: [b, s, V]   at: [b, s, K]   y: [b, s, K]     -> [b, s, V]
    index(x, [None, at]):    x: [b, S, h]   at: [i, j]                       -> [b, i, j, h]

The dim that is looked up is whole; what is looked up is parallel, what is written is whole.
"""

from collections.abc import Sequence

from autosp_aot.ir.program import Args
from autosp_aot.sharding.call import Call, Rule, Whole
from autosp_aot.sharding.spec import Axis, Dims, Linear, Spec, identity


def gather(call: Call) -> Spec:
    return _along_index(call, written=False, linear=((0,),))


def scatter(linear: bool) -> Rule:
    """`linear`: in the operand and the source together, which replaces it or is added to it."""

    def rule(call: Call) -> Spec:
        sets: Linear = ((0, 2) if len(call.operands) == 3 else (0,),) if linear else ()
        return _along_index(call, written=True, linear=sets)

    return rule


def _along_index(call: Call, written: bool, linear: Linear) -> Spec:
    """Operand 0 is looked up along argument 1; the others have the index's dims, of which some may be shorter."""
    shape = call.operands[0].shape
    dim = call.instr.args[1] % max(len(shape), 1)
    extents, whole = list(shape), {dim} if shape else set()
    if any(other[d] != shape[d] for d in range(len(shape)) if d != dim for other in _shapes(call)[1:]):
        whole.update(range(len(shape)))
    seen: dict[tuple[int, int], Axis] = {}

    def axis(at: int, size: int) -> Axis:
        if at != dim and size == shape[at]:
            return Axis(at)
        if (at, size) not in seen:
            seen[at, size] = Axis(len(extents))
            extents.append(size)
            if written or at != dim or len(whole) > 1:
                whole.add(len(extents) - 1)
        return seen[at, size]

    others = tuple(tuple((axis(at, size),) for at, size in enumerate(other)) for other in _shapes(call)[1:])
    first, follows = identity(shape), tuple((dim, axis.factor) for (at, _), axis in seen.items() if at == dim)
    return Spec(tuple(extents), frozenset(whole), (first, *others), (first if written else others[0],), linear=linear,
                follows=follows)  # fmt: skip


def _shapes(call: Call) -> list[tuple[int, ...]]:
    return [value.shape for value in call.operands]


def index(call: Call) -> Spec:
    return _indexed(call, call.operands[1:], call.results[0].shape, written=None)


def index_put(call: Call) -> Spec | None:
    """Positions that are written more than once need all that is written there: the index is whole."""
    *indices, values = call.operands[1:]
    shape, slots = call.operands[0].shape, call.instr.args[1]
    if any(value.dtype in ("b8", "u8") for value in indices):
        return None
    spread = max(len(value.shape) for value in indices)
    sizes = [1] * spread
    for value in indices:
        for at, size in enumerate(reversed(value.shape)):
            sizes[-1 - at] = max(sizes[-1 - at], size) if size else 0
    at = _lead(slots)
    rest = [size for dim, size in enumerate(shape) if dim >= len(slots) or slots[dim] is None]
    return _indexed(call, indices, (*rest[:at], *sizes, *rest[at:]), written=values)


def _indexed(call: Call, indices: Sequence[Whole], looked_up: tuple[int, ...], written: Whole | None) -> Spec:
    """`looked_up` is the shape of x[indices]; `written` has that shape, or broadcasts to it."""
    shape, slots = call.operands[0].shape, call.instr.args[1]
    named = [dim for dim, slot in enumerate(slots) if slot is not None]
    rest = [dim for dim in range(len(shape)) if dim not in named]
    spread, lead = len(looked_up) - len(rest), _lead(slots)
    new = range(len(shape), len(shape) + spread)
    extents = (*shape, *looked_up[lead : lead + spread])
    factors = (*rest[:lead], *new, *rest[lead:])
    operands = [identity(shape), *(_broadcast(value.shape, new, extents) for value in indices)]
    whole, follows = frozenset(named), ((named[0], new[0]),) if len(named) == len(new) == 1 else ()
    if written is None:
        result = _broadcast(looked_up, factors, extents)
        return Spec(extents, whole, tuple(operands), (result,), linear=((0,),), follows=follows)
    operands.append(_broadcast(written.shape, factors, extents))
    linear = ((0, len(operands) - 1),)
    return Spec(extents, whole | set(new), tuple(operands), (identity(shape),), linear=linear, follows=follows)


def _lead(slots: Args) -> int:
    """Where the dims of the indices are in x[indices]: at the first of them, or first if other dims part them."""
    named = [dim for dim, slot in enumerate(slots) if slot is not None]
    return named[0] if named[-1] - named[0] == len(named) - 1 else 0


def _broadcast(shape: tuple[int, ...], factors: Sequence[int], extents: Sequence[int]) -> Dims:
    """Dims that are broadcast to these factors, aligned at the end."""
    last = factors[len(factors) - len(shape) :]
    return tuple((Axis(f),) if size == extents[f] else () for f, size in zip(last, shape))


def among(call: Call) -> Spec | None:
    """Each element of the operand that has the result's shape, looked for in the other, a list that is whole."""
    shape = call.results[0].shape
    kept = 1 if call.instr.op == "aten.searchsorted.Tensor" else 0
    others = [value.shape for at, value in enumerate(call.operands) if at != kept]
    if len(others) != 1 or (kept == 1 and len(others[0]) != 1):
        return None
    other = tuple((Axis(len(shape) + dim),) for dim in range(len(others[0])))
    extents, whole = (*shape, *others[0]), frozenset(range(len(shape), len(shape) + len(other)))
    operands = (other, identity(shape)) if kept == 1 else (identity(shape), other)
    return Spec(extents, whole, operands, (identity(shape),))
