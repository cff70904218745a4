"""Products of matrices as a model may write them, and key/value heads before they are repeated.

matmul(a, b), bmm(a, b), baddbmm(x, a, b), einsum("bnsd,bntd->bnst", a, b)      left [..., i, c], right [..., c, j]
k2 = k[:, :, None].expand(B, Nkv, G, T, D).reshape(B, Nkv * G, T, D)             k, repeated G times
"""

import string
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from autosp_aot.export.canonical.shapes import RESHAPES, SAME

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)

# Operators that only move, repeat or rename elements, and can stand between a key/value head and its repetition.
MOVES = (*SAME, *RESHAPES, aten.expand.default, aten.repeat_interleave.self_int, aten.slice.Tensor)


def made(graph: Graph, target, args: tuple, value, like: Node) -> Node:
    """A call before the graph's insertion point, with the source of `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: entry for key, entry in like.meta.items() if key != "val"} | {"val": value}
    return node


@dataclass(frozen=True)
class Product:
    """A product of matrices in the letters of an einsum: left `lead i c`, right `lead c j`, in any order of dims.

    `lead` are the leading dims in order, `letters` i, j and c. Right may lack leading dims: it is the same along them.
    """

    node: Node
    left: Node
    right: Node
    words: tuple[str, str, str]
    lead: str
    letters: tuple[str, str, str]

    def operands(self, graph: Graph) -> tuple[Node, Node]:
        """Left as [*lead, i, c] and right as [*lead, c, j], made before the graph's insertion point if need be."""
        i, j, c = self.letters
        left = self._ordered(graph, self.left, self.words[0], self.lead + i + c)
        return left, self._ordered(graph, self.right, self.words[1], self.lead + c + j)

    def result(self, graph: Graph, node: Node) -> Node:
        """A node [*lead, i, j] in the order of the product's result."""
        i, j, _ = self.letters
        return self._ordered(graph, node, self.lead + i + j, self.words[2])

    def _ordered(self, graph: Graph, node: Node, word: str, wanted: str) -> Node:
        order = [word.index(letter) for letter in wanted if letter in word]
        if order != sorted(order):
            node = made(graph, aten.permute.default, (node, order), node.meta["val"].permute(order), self.node)
        for at, letter in enumerate(wanted):
            if letter not in word:
                node = made(graph, aten.unsqueeze.default, (node, at), node.meta["val"].unsqueeze(at), self.node)
        return node


def product_of(node: Node, rows: int) -> Product | None:
    """The product that a node is, its rows being the last dim but one of the left operand (`rows` 0) or of the result
    (2); None for everything else, and where the right operand has no batch."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    left, right = node.args[1] if node.target is aten.einsum.default and len(node.args[1]) == 2 else node.args[-2:]
    words = _words(node, left, right)
    if words is None or min(map(len, words)) < 2 or any(len(set(word)) != len(word) for word in words):
        return None
    a, b, out = map(set, words)
    i, j, c = words[rows][-2], "".join(b & out - a), "".join(a & b - out)
    lead = "".join(letter for letter in words[rows] if letter not in i + j + c)
    if len(j + c) != 2 or a != {*lead, i, c} or out != {*lead, i, j} or i in b or not b <= {*lead, j, c}:
        return None
    if lead and not b & set(lead):
        return None
    return Product(node, left, right, words, lead, (i, j, c))


def _words(node: Node, left: Node, right: Node) -> tuple[str, str, str] | None:
    """The letters of the dims of both operands and of the result."""
    dims = [operand.meta["val"].dim() for operand in (left, right, node)]
    if node.target is not aten.einsum.default:
        lead = string.ascii_lowercase[: dims[0] - 2]
        return (lead + "xz", lead + "zy", lead + "xy") if len(set(dims)) == 1 else None
    given, arrow, result = node.args[0].replace(" ", "").partition("->")
    words = [*given.split(","), result]
    if not arrow or len(words) != 3:
        return None
    for at, word in enumerate(words):
        more = dims[at] - len(word.replace("...", ""))
        words[at] = word.replace("...", string.digits[10 - more :]) if "..." in word and more <= 10 else word
    return tuple(words)


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
    dims: list[list[int | str]] = [[dim] if size > 1 else [] for dim, size in enumerate(source.meta["val"].shape)]
    sizes: dict[int | str, int] = dict(enumerate(source.meta["val"].shape))
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
            joined = regroup([atom for dim in dims for atom in dim], sizes, shape)
            if joined is None:
                return None
            dims = joined
    return dims


def regroup(atoms: list, sizes: dict, shape: tuple[int, ...]) -> list[list] | None:
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
