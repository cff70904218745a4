"""Products of matrices as a model may write them, and key/value heads before they are repeated.

matmul(a, b), bmm(a, b), baddbmm(x, a, b), einsum("bnsd,bntd->bnst", a, b)      left [..., i, c], right [..., c, j]
k2 = k[:, :, None].expand(B, Nkv, G, T, D).reshape(B, Nkv * G, T, D)             k, repeated G times
"""

import string
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Product:
    """A product of matrices in the letters of an einsum: left `lead i c`, right `lead c j`, in any order of dims."""

    node: Node
    left: Node
    right: Node
    words: tuple[str, str, str]

    def operands(self, graph: Graph, lead: str) -> tuple[Node, Node]:
        """Left as [*lead, i, c] and right as [*lead, c, j], made before the graph's insertion point if need be."""
        i, j, c = self.letters
        return self._ordered(graph, self.left, self.words[0], lead + i + c), self._ordered(
            graph, self.right, self.words[1], lead + c + j
        )

    def result(self, graph: Graph, node: Node, lead: str) -> Node:
        """A node [*lead, i, j] in the order of the product's result."""
        i, j, _ = self.letters
        return self._ordered(graph, node, lead + i + j, self.words[2])

    @property
    def letters(self) -> tuple[str, str, str]:
        """The letters of rows, of columns, and of what is summed over."""
        a, b, out = map(set, self.words)
        return (a & out - b).pop(), (b & out - a).pop(), (a & b - out).pop()

    def _ordered(self, graph: Graph, node: Node, word: str, wanted: str) -> Node:
        if word == wanted:
            return node
        order = [word.index(letter) for letter in wanted]
        return made(graph, aten.permute.default, (node, order), node.meta["val"].permute(order), self.node)


def product_of(node: Node) -> Product | None:
    """The product that a node is; None for everything else, and where leading dims are broadcast by being left out."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    if node.target is aten.einsum.default:
        text, (left, *rest) = node.args[0].replace(" ", ""), node.args[1]
        words = (*text.partition("->")[0].split(","), text.partition("->")[2])
        if "." in text or len(rest) != 1 or len(words) != 3 or any(len(set(word)) != len(word) for word in words):
            return None
        a, b, out = map(set, words)
        if [len(a & out - b), len(b & out - a), len(a & b - out)] != [1, 1, 1] or a ^ b ^ out != a & b & out:
            return None
        return Product(node, left, rest[0], words)
    left, right = node.args[-2:]
    dims = node.meta["val"].dim()
    if left.meta["val"].dim() != dims or right.meta["val"].dim() != dims or dims < 2:
        return None
    lead = string.ascii_lowercase[: dims - 2]
    return Product(node, left, right, (lead + "xz", lead + "zy", lead + "xy"))


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
