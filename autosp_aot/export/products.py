"""Products of matrices as a model may write them, and key/value heads before they are repeated.

matmul(a, b), bmm(a, b), baddbmm(x, a, b), einsum("bnsd,bntd->bnst", a, b)      left [..., i, c], right [..., c, j]
k2 = k[:, :, None].expand(B, Nkv, G, T, D).reshape(B, Nkv * G, T, D)             k, repeated G times
"""

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)

# Operators that only move, repeat or rename elements, and can stand between a key/value head and its repetition.
MOVES = (
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten._unsafe_view.default,
    aten.clone.default, aten.contiguous.default, aten.slice.Tensor, aten.repeat_interleave.self_int,
    aten.flatten.using_ints,
)  # fmt: skip


def made(graph: Graph, target, args: tuple, value, like: Node) -> Node:
    """A call before the graph's insertion point, with the source of `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: entry for key, entry in like.meta.items() if key != "val"} | {"val": value}
    return node


def left_and_right(graph: Graph, product: Node) -> tuple[Node, Node]:
    """The operands of a product as [..., i, c] and [..., c, j], its result being [..., i, j]."""
    if product.target is not aten.einsum.default:
        left, right = product.args[-2:]
        return left, right
    words, operands = _einsum(product)
    *lead, i, j = words[2]
    (c,) = set(words[0]) - set(words[2])
    orders = [[words[0].index(x) for x in (*lead, i, c)], [words[1].index(x) for x in (*lead, c, j)]]
    return tuple(
        made(graph, aten.permute.default, (node, order), node.meta["val"].permute(order), product)
        for node, order in zip(operands, orders)
    )


def is_product(node: Node) -> bool:
    """True for a product of two matrices with the same leading dims on both sides and in the result."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return False
    if node.target is aten.einsum.default:
        return _einsum(node)[0] is not None
    return all(operand.meta["val"].dim() == node.meta["val"].dim() for operand in node.args[-2:])


def _einsum(node: Node) -> tuple[list[str] | None, list[Node]]:
    """The letters of two operands and the result of an einsum that is a product of matrices, and the operands."""
    text, operands = node.args[0].replace(" ", ""), list(node.args[1])
    left, _, result = text.partition("->")
    words = [*left.split(","), result]
    if "." in text or len(words) != 3 or any(len(set(word)) != len(word) for word in words) or len(result) < 3:
        return None, operands
    a, b, out = map(set, words)
    lead, i, j = set(result[:-2]), result[-2], result[-1]
    fits = a - out == b - out and len(a - out) == 1 and a & out == lead | {i} and b & out == lead | {j}
    return (words if fits else None), operands


def transposed(graph: Graph, node: Node) -> Node:
    """A node whose last two dims are swapped back: what was transposed, where that is seen."""
    dims = node.meta["val"].dim()
    swapped = [*range(dims - 2), dims - 1, dims - 2]
    if node.target is aten.transpose.int and {at % dims for at in node.args[1:]} == {dims - 1, dims - 2}:
        return node.args[0]
    if node.target is aten.permute.default and [at % dims for at in node.args[1]] == swapped:
        return node.args[0]
    return made(graph, aten.permute.default, (node, swapped), node.meta["val"].permute(swapped), node)


def before_repetition(node: Node, dirty: set[Node]) -> tuple[Node, int]:
    """The tensor [B, Nkv, S, D] whose heads `node` repeats, and how often; the node itself and 1 where it does not."""
    chain = [node]
    while chain[-1].op == "call_function" and chain[-1].target in MOVES and chain[-1] not in dirty:
        chain.append(chain[-1].args[0])
    for start in range(1, len(chain)):
        source = chain[start]
        if source.meta["val"].dim() == 4:
            dims = _follow(chain[:start][::-1], source)
            own = [[dim] if size > 1 else [] for dim, size in enumerate(source.meta["val"].shape)]
            if dims is not None and [dims[0], dims[1][:-1], *dims[2:]] == own and dims[1][-1:] not in ([], [1]):
                return source, node.meta["val"].shape[1] // source.meta["val"].shape[1]
    return node, 1


def _follow(chain: list[Node], source: Node) -> list[list] | None:
    """Each dim of the chain's end as the list of what it consists of: dims of the source (numbers) and repeats ("x4").

    Dims of size one are left out.
    """
    dims = [[dim] if size > 1 else [] for dim, size in enumerate(source.meta["val"].shape)]
    sizes = dict(enumerate(source.meta["val"].shape))
    for node in chain:
        before, shape = node.args[0].meta["val"].shape, node.meta["val"].shape
        if node.target is aten.unsqueeze.default:
            at = node.args[1] % len(shape)
            dims.insert(at, [])
        elif node.target is aten.expand.default:
            for dim, (old, new) in enumerate(zip(before, shape)):
                if old != new:
                    dims[dim] = [f"x{len(sizes)}"]
                    sizes[f"x{len(sizes)}"] = new
        elif node.target is aten.repeat_interleave.self_int:
            if len(node.args) < 3:
                return None
            at = node.args[2] % len(shape)
            dims[at] = [*dims[at], f"x{len(sizes)}"]
            sizes[f"x{len(sizes)}"] = node.args[1]
        elif node.target is aten.slice.Tensor:
            if before != shape:
                return None
        elif before != shape:
            dims = _regroup([atom for dim in dims for atom in dim], sizes, shape)
            if dims is None:
                return None
    return dims


def _regroup(atoms: list, sizes: dict, shape: tuple[int, ...]) -> list[list] | None:
    """Deal the atoms out over the dims of a reshape; None where a dim would have to cut an atom."""
    dims, left = [], list(atoms)
    for size in shape:
        dim, got = [], 1
        while got < size and left:
            got *= sizes[left[0]]
            dim.append(left.pop(0))
        if got != size:
            return None
        dims.append(dim)
    return None if left else dims
