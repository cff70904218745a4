"""What the exported graph makes of attention scores, as an expression that never exists as a tensor (see `scores`).

    rows = arange(S)[:, None]                     "q"
    keys = arange(S)[None, :]                     "k"
    same = doc[:, :, None] == doc[:, None, :]     ("aten.eq.Tensor", "v0", "v1")     v0 [B, 1, S, 1], v1 [B, 1, 1, S]
    mask = (keys <= rows) & same                  ("aten.__and__.Tensor", ("aten.le.Tensor", "k", "q"), ...)

From the mask or the scores upwards, whatever has rows and keys and works element by element becomes part of the
expression; what varies along one of them only is a vector and stays a value of the graph.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, Node

from autosp_aot.export.attention.products import made, regroup
from autosp_aot.export.canonical.constants import CASTS, Known, evaluate, functional, is_elementwise
from autosp_aot.export.canonical.shapes import RESHAPES, SAME
from autosp_aot.ir.operators import DTYPE_NAMES as DTYPES
from autosp_aot.ir.program import Arg
from autosp_aot.ir.score_expr import NODES

aten = torch.ops.aten

# What a vector with rows and keys may take.
MATRIX_BYTES = 2**28
RUNS = 8  # of equal diagonals in a constant matrix

# What an operand has to be for the result to be the other one.
NEUTRAL = {
    "__and__": True, "bitwise_and": True, "logical_and": True,
    "__or__": False, "bitwise_or": False, "logical_or": False,
}  # fmt: skip
# For each leading dim of a node, which of the attention's leading dims it is: several where they are joined to one.
Slots = tuple[tuple[int, ...], ...]


@dataclass
class Scores:
    """Expressions over the scores [*lead, rows, keys] of one attention; `vectors` are the nodes they read.

    The first of the leading dims is the batch, all others together are the heads. `product` is the node of the
    products of queries and keys, where there is one, or None. What was computed without gradients (`frozen`) from
    floating vectors stays a value, so that no gradient goes through it.
    """

    lead: tuple[int, ...]
    rows: int
    keys: int
    known: dict[Node, Known]
    written: set[Node]
    frozen: set[Node]
    product: Node | None = None
    vectors: list[tuple[Node, Slots, Node | None]] = field(default_factory=list)
    parts: int = 0

    @property
    def slots(self) -> Slots:
        """Those of a node with all leading dims, each by itself."""
        return tuple((at,) for at in range(len(self.lead)))

    def of(self, node, slots: Slots, reader: Node):
        """The expression of a node whose leading dims are `slots`, as `reader` reads it.

        ValueError where it cannot be followed.
        """
        if not isinstance(node, Node):
            return node
        self.parts += 1
        if self.parts > NODES:
            raise ValueError(f"the scores are made by more than {NODES} operators")
        if node is self.product:
            return self.products(node, slots)
        value = evaluate(node, self.known)
        if value is not None and (found := self.constant(node, value)) is not None:
            return found
        if self.is_vector(node):
            return self.vector(node, slots, reader)
        count = len(self.vectors)
        found = self.operator(node, slots)
        more = [vector.meta["val"].is_floating_point() for vector, *_ in self.vectors[count:]]
        if found is None or (node in self.frozen and any(more)):
            del self.vectors[count:]
            found = self.vector(node, slots, reader)
        return found

    def whole(self, node: Node, slots: Slots, reader: Node):
        """The expression of a mask; one that is made by too many operators is a vector."""
        try:
            return self.of(node, slots, reader)
        except ValueError:
            self.vectors.clear()
            return self.vector(node, slots, reader)

    def products(self, product: Node, slots: Slots) -> Arg:
        if self.places(slots, product.meta["val"].shape[:-2]) != self.places(self.slots, self.lead):
            raise ValueError("the dims of the products are mixed or repeated")
        # Half dtypes round the products before anything is made of them.
        dtype = DTYPES[product.meta["val"].dtype]
        products = ("cast", dtype, "s") if dtype in ("bf16", "f16") else "s"
        if product.target is not aten.baddbmm.default:
            return products
        beta, alpha = (product.kwargs.get(name, 1) for name in ("beta", "alpha"))
        scaled = ("aten.mul.Tensor", products, alpha)
        if beta == 0:
            return scaled
        added = self.of(product.args[0], self.right(product.args[0], slots), product)
        return ("aten.add.Tensor", ("aten.mul.Tensor", added, beta), scaled)

    def constant(self, node: Node, value: Tensor):
        """A known value as an expression, where it has one: a number, positions, or bands of a matrix."""
        dtype = DTYPES[value.dtype]
        if value.numel() == 1:
            return ("constant", dtype, value.item())
        sizes = [1] * (2 - value.dim()) + list(value.shape)
        if math.prod(sizes[:-2]) != 1:
            return None
        matrix = value.reshape(sizes[-2:])
        if 1 in matrix.shape:
            return _positions(matrix.flatten(), "q" if matrix.shape[0] > 1 else "k")
        return _diagonals(matrix, dtype)

    def is_vector(self, node: Node) -> bool:
        shape = (1, 1, *node.meta["val"].shape)[-2:]
        return 1 in shape

    def vector(self, node: Node, slots: Slots, reader: Node) -> str:
        """A leaf that stays a value of the graph; what is written in place is copied where it is read."""
        if self.product is not None and _depends(node, self.product):
            raise ValueError(f"{node.target} of the scores does not work element by element")
        entry = (node, slots, reader if node in self.written else None)
        if entry not in self.vectors:
            self.vectors.append(entry)
        return f"v{self.vectors.index(entry)}"

    def operator(self, node: Node, slots: Slots):
        """The expression of a call with rows and keys; None where it is no elementwise operator."""
        if node.op != "call_function" or node in self.written:
            return None
        target = functional(node.target)
        if target is None or torch.Tag.nondeterministic_seeded in target.tags:
            return None
        args, shape = node.args, node.meta["val"].shape
        if target in SAME:
            return self.of(args[0], slots, node)
        if target is aten.expand.default:
            return self.of(args[0], self.right(args[0], slots), node)
        if target is aten.unsqueeze.default:
            at = args[1] % len(shape)
            return self.of(args[0], slots[:at] + slots[at + 1 :], node) if at < len(shape) - 2 else None
        if target in RESHAPES:
            return self.viewed(node, slots)
        if target is aten.slice.Tensor:
            return self.sliced(node, slots)
        if target in (aten.tril.default, aten.triu.default):
            name = "aten.le.Tensor" if target is aten.tril.default else "aten.ge.Tensor"
            edge = ("aten.add.Tensor", "q", args[1] if len(args) > 1 else 0)
            zero = ("constant", DTYPES[node.meta["val"].dtype], 0)
            return ("aten.where.self", (name, "k", edge), self.of(args[0], slots, node), zero)
        if target in CASTS or target is aten.type_as.default:
            inner = self.of(args[0], slots, node)
            same = args[0].meta["val"].dtype == node.meta["val"].dtype
            return inner if same else ("cast", DTYPES[node.meta["val"].dtype], inner)
        if not is_elementwise(target) or any(name != "alpha" or value != 1 for name, value in node.kwargs.items()):
            return None
        operands = [self.of(arg, self.right(arg, slots), node) for arg in args]
        truths = all(isinstance(arg, Node) and arg.meta["val"].dtype is torch.bool for arg in args)
        return _simple(str(target), operands) if truths else (str(target), *operands)

    def right(self, operand, slots: Slots) -> Slots:
        """The slots of an operand that broadcasts to a result with `slots`."""
        lead = operand.meta["val"].dim() - 2 if isinstance(operand, Node) else 0
        return slots[len(slots) - lead :] if lead > 0 else ()

    def viewed(self, node: Node, slots: Slots):
        """A view that joins or separates leading dims."""
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
        if before == after:
            return self.of(node.args[0], slots, node)
        left = self.places(slots, after[:-2])
        if before[-2:] != after[-2:] or left is None:
            return None
        found = regroup(left, dict(enumerate(self.lead)), before[:-2])
        return None if found is None else self.of(node.args[0], tuple(map(tuple, found)), node)

    def places(self, slots: Slots, sizes: tuple[int, ...]) -> list[int] | None:
        """The leading dims of the attention along which leading dims of these sizes vary; None where one is cut."""
        found = [at for slot, size in zip(slots, sizes, strict=True) if size > 1 for at in slot if self.lead[at] > 1]
        return found if math.prod(self.lead[at] for at in found) == math.prod(sizes) else None

    def sliced(self, node: Node, slots: Slots):
        """The first rows, keys or everything: positions stay what they are."""
        _, dim, start, _, step = node.args + (None, 0, None, None, 1)[len(node.args) :]
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
        dim %= len(before)
        if step != 1 or start not in (None, 0) or (dim < len(before) - 2 and before != after):
            return None
        return self.of(node.args[0], slots, node)

    def largest(self) -> Node | None:
        """A vector with rows and keys that takes more than MATRIX_BYTES."""
        for node, *_ in self.vectors:
            if not self.is_vector(node) and node.meta["val"].nbytes > MATRIX_BYTES:
                return node
        return None

    def emit(self, graph: Graph) -> list[Node]:
        """The vectors as nodes of four dims each, made before the graph's insertion point."""
        found = []
        for node, slots, reader in self.vectors:
            if reader is not None:
                with graph.inserting_before(reader):
                    node = made(graph, aten.clone.default, (node,), node.meta["val"].clone(), node)
            found.append(self.shaped(graph, node, slots))
        return found

    def shaped(self, graph: Graph, node: Node, slots: Slots) -> Node:
        value = node.meta["val"]
        full = self.places(slots, value.shape[: len(slots)])
        assert full is not None, "a vector cuts no leading dim"
        sizes = [size if at in full else 1 for at, size in enumerate(self.lead)]
        tail = (1, 1, *value.shape)[-2:]
        if math.prod(sizes[1:]) not in (1, math.prod(self.lead[1:])):
            node = made(graph, aten.reshape.default, (node, [*sizes, *tail]), value.reshape(*sizes, *tail), node)
            sizes[1:], value = self.lead[1:], node.meta["val"]
            wide = [*sizes, *tail]
            node = made(graph, aten.expand.default, (node, wide), value.expand(wide), node)
        shape = [sizes[0], math.prod(sizes[1:]), *tail]
        node = made(graph, aten.reshape.default, (node, shape), node.meta["val"].reshape(shape), node)
        for dim, size in ((2, self.rows), (3, self.keys)):
            if shape[dim] > max(size, 1):
                cut = node.meta["val"].narrow(dim, 0, size)
                node = made(graph, aten.slice.Tensor, (node, dim, 0, size), cut, node)
        return node


def _simple(name: str, operands: list):
    """A call of an elementwise operator on truths; True in `and` and False in `or` say nothing."""
    neutral = NEUTRAL.get(name.split(".")[1])
    if neutral is not None:
        left = [operand for operand in operands if operand != ("constant", "b8", neutral)]
        if len(left) < 2:
            return left[0] if left else operands[0]
    return (name, *operands)


def _positions(vector: Tensor, leaf: str):
    """Whole numbers that grow by equal steps, as positions; None for all others."""
    step, first = (vector[1] - vector[0]).item() if vector.dtype is not torch.bool else 0, vector[0].item()
    if vector.is_floating_point() or step == 0 or not bool((vector.diff() == step).all()):
        return None
    scaled = leaf if step == 1 else ("aten.mul.Tensor", leaf, step)
    return scaled if first == 0 else ("aten.add.Tensor", scaled, first)


def _diagonals(matrix: Tensor, dtype: str):
    """A matrix with equal diagonals, as comparisons of k - q; None where they are not equal, or there are many."""
    if not bool((matrix[1:, 1:] == matrix[:-1, :-1]).all()):
        return None
    edge = torch.cat([matrix[:, 0].flip(0), matrix[0, 1:]])
    last = (edge[1:] != edge[:-1]).nonzero().flatten().tolist()
    if len(last) >= RUNS:
        return None
    found: Arg = ("constant", dtype, edge[-1].item())
    for at in last[::-1]:
        below = ("aten.le.Scalar", ("aten.sub.Tensor", "k", "q"), at - (matrix.shape[0] - 1))
        found = ("aten.where.self", below, ("constant", dtype, edge[at].item()), found)
    return found


def _depends(node: Node, on: Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is on:
            return True
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return False
