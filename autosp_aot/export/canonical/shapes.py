"""Views, parts and joins, in one spelling each.

    t, transpose, permute                          -> aten.permute.default       (chains composed)
    view, _unsafe_view, unsqueeze, squeeze ...     -> aten.reshape.default       (chains composed)
    split, unbind, select;  stack                  -> aten.slice.Tensor;  aten.cat.default
    select_backward                                -> aten.slice_backward.default
    what changes nothing                           -> gone
"""

import torch
from torch import Tensor
from torch.fx import Node

from autosp_aot.ir.program import Ref

aten = torch.ops.aten
# The same tensor again; so gives `detach`, where gradients are none of the reader's business.
SAME = (
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift.default, aten.lift_fresh_copy.default,
)  # fmt: skip
# The same elements in the same order, in another shape.
RESHAPES = (
    aten._unsafe_view.default, aten.flatten.using_ints, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unflatten.int, aten.unsqueeze.default, aten.view.default,
)  # fmt: skip
# The same elements with the dims in another order.
PERMUTES = (aten.permute.default, aten.t.default, aten.transpose.int)


def shaped(node: Node, canonical) -> tuple[str, ...]:
    """Emit the calls that stand for a node of SHAPES; the names of its results."""
    found = SHAPES[node.target](node, canonical)
    return found if isinstance(found, tuple) else (found,)


def expand(node: Node, canonical, operand: str) -> str:
    """A value in the shape of a node's result."""
    shape = tuple(node.meta["val"].shape)
    if canonical.types[operand].shape == shape:
        return operand
    return canonical.emit(node, "aten.expand.default", (Ref(operand), shape), (), [node.meta["val"]])[0]


def _expand(node: Node, canonical) -> str:
    return expand(node, canonical, canonical.names[node.args[0]])


def _reshape(node: Node, canonical) -> str:
    return _reshaped(node, canonical, canonical.names[node.args[0]], node.meta["val"])


def _reshaped(node: Node, canonical, operand: str, result: Tensor) -> str:
    source = canonical.made.get(operand)
    if source is not None and source.op == "aten.reshape.default":
        operand = source.args[0].name
    if canonical.types[operand].shape == tuple(result.shape):
        return operand
    return canonical.emit(node, "aten.reshape.default", (Ref(operand), tuple(result.shape)), (), [result])[0]


def _permute(node: Node, canonical) -> str:
    operand, result = canonical.names[node.args[0]], node.meta["val"]
    dims, source = _permutation(node.target, node.args, result.dim()), canonical.made.get(operand)
    if source is not None and source.op == "aten.permute.default":
        operand, dims = source.args[0].name, tuple(source.args[1][d] for d in dims)
    if dims == tuple(range(len(dims))):
        return operand
    return canonical.emit(node, "aten.permute.default", (Ref(operand), dims), (), [result])[0]


def _permutation(target, args, dims: int) -> tuple[int, ...]:
    if target is aten.permute.default:
        return tuple(d % dims for d in args[1])
    order = list(range(dims))
    a, b = (0, 1) if target is aten.t.default else (args[1] % dims, args[2] % dims)
    if dims > 1:
        order[a], order[b] = order[b], order[a]
    return tuple(order)


def _slice(node: Node, canonical) -> str:
    operand, result = canonical.names[node.args[0]], node.meta["val"]
    _, dim, start, end, step = node.args + (None, 0, None, None, 1)[len(node.args) :]
    size = canonical.types[operand].shape[dim]
    start, end, step = slice(start, end, step).indices(size)
    if (start, step) == (0, 1) and end >= size:
        return operand
    args = (Ref(operand), dim % result.dim(), start, max(start, end), step)
    return canonical.emit(node, "aten.slice.Tensor", args, (), [result])[0]


def _select(node: Node, canonical) -> str:
    operand, result = canonical.names[node.args[0]], node.meta["val"]
    dim = node.args[1] % (result.dim() + 1)
    at = node.args[2] % canonical.types[operand].shape[dim]
    args, one = (Ref(operand), dim, at, at + 1, 1), result.unsqueeze(dim)
    return _reshaped(node, canonical, canonical.emit(node, "aten.slice.Tensor", args, (), [one])[0], result)


def _select_backward(node: Node, canonical) -> str:
    """A gradient put back at one position of a dim of zeros."""
    gradient, sizes, dim, at = node.args
    dim %= len(sizes)
    at %= sizes[dim]
    one = _reshaped(node, canonical, canonical.names[gradient], gradient.meta["val"].unsqueeze(dim))
    args = (Ref(one), tuple(sizes), dim, at, at + 1, 1)
    return canonical.emit(node, "aten.slice_backward.default", args, (), [node.meta["val"]])[0]


def _split(node: Node, canonical) -> tuple[str, ...]:
    """The parts of a dim, a slice each."""
    operand, parts = canonical.names[node.args[0]], node.meta["val"]
    unbound = node.target is aten.unbind.int
    dims = node.args[0].meta["val"].dim()
    dim = (node.args[-1] if len(node.args) > 1 + (not unbound) else 0) % dims
    names, start = [], 0
    for part in parts:
        piece = part.unsqueeze(dim) if unbound else part
        end = start + piece.shape[dim]
        name = canonical.emit(node, "aten.slice.Tensor", (Ref(operand), dim, start, end, 1), (), [piece])[0]
        names.append(_reshaped(node, canonical, name, part) if unbound else name)
        start = end
    return tuple(names)


def _cat(node: Node, canonical) -> str:
    parts = [part for part in node.args[0] if part.meta["val"].numel() or part.meta["val"].dim() > 1]
    return _joined(node, canonical, [canonical.names[part] for part in parts])


def _stack(node: Node, canonical) -> str:
    dim = _dim(node)
    ones = [(canonical.names[part], part.meta["val"].unsqueeze(dim)) for part in node.args[0]]
    return _joined(node, canonical, [_reshaped(node, canonical, *one) for one in ones])


def _joined(node: Node, canonical, parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    args = (tuple(map(Ref, parts)), _dim(node))
    return canonical.emit(node, "aten.cat.default", args, (), [node.meta["val"]])[0]


def _dim(node: Node) -> int:
    return (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()


SHAPES = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(PERMUTES, _permute),
    aten.cat.default: _cat,
    aten.expand.default: _expand,
    aten.select.int: _select,
    aten.select_backward.default: _select_backward,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.stack.default: _stack,
    aten.unbind.int: _split,
    aten.unsafe_split.Tensor: _split,
    aten.unsafe_split_with_sizes.default: _split,
}
