"""Attention masks as predicates: what a mask says is found without ever making it.

A mask is built from vectors along the query or the key dim. Vectors are computed for real (O(S), repeats stored once);
a comparison of two vectors is kept as a `Select`, and only asked which keys each query sees.

    keys = arange(S)[None, :]            varies along the last dim
    rows = arange(S)[:, None]            varies along the dim before
    mask = keys <= rows                  Select(le, keys, rows, True, False)
    bias = where(mask, 0, -inf)          Select(le, keys, rows, 0, -inf)          both say: causal
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

COMPARES = {
    aten.le.Tensor: operator.le, aten.lt.Tensor: operator.lt, aten.ge.Tensor: operator.ge, aten.gt.Tensor: operator.gt,
}  # fmt: skip
FLIPPED = {operator.le: operator.ge, operator.lt: operator.gt, operator.ge: operator.le, operator.gt: operator.lt}
NEGATED = {operator.le: operator.gt, operator.lt: operator.ge, operator.ge: operator.lt, operator.gt: operator.le}

# Operators that add size-one dims, repeat or copy: a comparison of keys with rows passes through them.
PASS = (
    aten.expand.default, aten.unsqueeze.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.detach.default, aten.lift_fresh_copy.default,
)  # fmt: skip
# Elementwise operators that torch does not tag so.
UNTAGGED = (
    aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.__and__.Tensor, aten.__or__.Tensor,
    aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther,
)  # fmt: skip
# A mask that mixes positions (cumsum, roll) is computed for real up to this size: [B, S], not [S, S].
COMPUTED = 2**24
CONSTANTS = (aten.full.default, aten.new_ones.default, aten.ones.default, aten.zeros.default)


@dataclass(frozen=True)
class Select:
    """`yes` where `compare(keys[k], rows[q])` holds, else `no`, for every query q (dim -2) and key k (dim -1).

    keys and rows are 1-D; yes and no hold one element.
    """

    compare: Callable
    keys: Tensor
    rows: Tensor
    yes: Tensor
    no: Tensor

    def causal(self) -> bool:
        """True when query q sees exactly the keys 0..q: True or 0 there, False or -inf elsewhere."""
        if not _lets_through(self.yes):
            swapped = replace(self, compare=NEGATED[self.compare], yes=self.no, no=self.yes)
            return _lets_through(self.no) and swapped.causal()
        stops = not self.no.item() if self.no.dtype == torch.bool else self.no.item() == float("-inf")
        count = len(self.rows)
        if not stops or self.compare not in (operator.le, operator.lt) or len(self.keys) != count:
            return False
        if not bool((self.keys.diff() >= 0).all()):
            return False
        seen = torch.searchsorted(self.keys, self.rows, right=self.compare is operator.le)
        return bool((seen == torch.arange(1, count + 1)).all())


Known = Select | Tensor | None


def evaluate(node: Node, known: dict[Node, Known]) -> Known:
    """What is known of a node: a Select, a constant with every repeated dim stored once, or None."""
    if node not in known:
        known[node] = _evaluate(node, known)
    return known[node]


def constants_of(exported: ExportedProgram) -> dict[Node, Known]:
    """What is known before looking: nothing of a tensor that is written to, the value of a lifted number."""
    known: dict[Node, Known] = dict.fromkeys(written(exported.graph))
    lifted = exported.graph_signature.inputs_to_lifted_tensor_constants
    for node in exported.graph.nodes:
        value = exported.constants.get(lifted.get(node.name))
        if value is not None and value.numel() == 1 and node not in known:
            known[node] = value
    return known


def written(graph: Graph) -> set[Node]:
    """Every node that shares its storage with something written in place, where anybody could see the difference.

        mask = zeros([S, S])
        row = select(mask, 0, 3)
        fill_(row, -inf)              mask and row are written; an evaluation of `mask` alone would miss it
    """
    source: dict[Node, Node] = {}
    dirty = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.target is operator.getitem:
                source[node] = source.get(node.args[0], node.args[0])
            elif _writes(graph.owning_module, node):
                dirty.update(source.get(operand, operand) for operand in node.all_input_nodes)
            continue
        given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args)) | node.kwargs
        for argument in node.target._schema.arguments:
            operand = given.get(argument.name)
            if argument.alias_info is None or not isinstance(operand, Node) or node.target is aten.detach_.default:
                continue
            if argument.alias_info.is_write and operand not in source and len(operand.users) == 1:
                continue
            source[node] = source.get(operand, operand)
            if argument.alias_info.is_write:
                dirty.add(source[node])
    return {node for node in graph.nodes if source.get(node, node) in dirty}


def _writes(module: GraphModule, region: Node) -> bool:
    """True where a region of the graph (no_grad, autocast) writes to anything in place."""
    inner = [getattr(module, operand.target) for operand in region.all_input_nodes if operand.op == "get_attr"]
    nodes = [(child, node) for child in inner if isinstance(child, GraphModule) for node in child.graph.nodes]
    return any(
        node.target._schema.is_mutable
        if isinstance(node.target, torch._ops.OpOverload)
        else node.op == "call_function" and node.target is not operator.getitem and _writes(child, node)
        for child, node in nodes
    )


def says_causal(said: Known) -> bool:
    """True when the mask is exactly the causal one."""
    return isinstance(said, Select) and said.causal()


def says_all(said: Known) -> bool:
    """True when the mask lets everything through."""
    return isinstance(said, Tensor) and said.numel() == 1 and _lets_through(said)


def _lets_through(said: Tensor) -> bool:
    return bool(said.item()) if said.dtype == torch.bool else said.item() == 0


def _evaluate(node: Node, known: dict[Node, Known]) -> Known:
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return None
    operands, target = [evaluate(n, known) for n in node.all_input_nodes], _functional(node.target)
    if target is None or any(said is None for said in operands) or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if any(isinstance(said, Select) for said in operands):
        return _map(node, target, known, operands)
    if target in (aten.tril.default, aten.triu.default):
        return _triangle(node, target, operands[0])
    if target in COMPARES and isinstance(node.args[1], Node):
        left, right = known[node.args[0]], known[node.args[1]]
        if _varying(left) | _varying(right) == {-1, -2}:
            return _compare(COMPARES[target], left, right)
    return _constant(node, target, known, operands)


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The operator that gives what an in-place one writes; what others see of the write is `written`'s matter."""
    if not target._schema.is_mutable:
        return target
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _constant(node: Node, target, known: dict[Node, Known], operands: list[Tensor]) -> Tensor | None:
    """The constant, computed; None where it would vary along more than one dim."""
    shape = node.meta["val"].shape
    if target is aten.expand.default:
        return operands[0].reshape([1] * (len(shape) - operands[0].dim()) + list(operands[0].shape))
    if target in CONSTANTS:
        args = [[1] * len(shape) if isinstance(arg, (list, tuple)) else arg for arg in node.args]
        return target(*map_arg(tuple(args), known.get), **node.kwargs)
    pointwise = _pointwise(target)
    if pointwise and len(set().union(*map(_varying, operands))) > 1:
        return None
    if not pointwise and max(n.meta["val"].numel() for n in (node, *node.all_input_nodes)) > COMPUTED:
        return None
    whole = lambda n: known[n] if pointwise else known[n].expand(n.meta["val"].shape)  # noqa: E731
    return _once(target(*map_arg(node.args, whole), **map_arg(node.kwargs, whole)))


def _pointwise(target) -> bool:
    return torch.Tag.pointwise in target.tags or target in UNTAGGED


def _once(tensor: Tensor) -> Tensor:
    """The tensor with every dim along which it only repeats itself narrowed to size one."""
    for dim in range(tensor.dim()):
        first = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
        if tensor.shape[dim] > 1 and bool((tensor == first).all()):
            tensor = first
    return tensor


def _varying(tensor: Tensor) -> set[int]:
    return {dim - tensor.dim() for dim, size in enumerate(tensor.shape) if size > 1}


def _compare(compare: Callable, left: Tensor, right: Tensor) -> Select | None:
    yes, no = torch.tensor(True), torch.tensor(False)
    if _varying(left) == {-1} and _varying(right) == {-2}:
        return Select(compare, left.flatten(), right.flatten(), yes, no)
    if _varying(left) == {-2} and _varying(right) == {-1}:
        return Select(FLIPPED[compare], right.flatten(), left.flatten(), yes, no)
    return None


def _triangle(node: Node, target, constant: Tensor) -> Select | None:
    """`tril` and `triu` of a constant that is the same everywhere."""
    rows, keys = node.meta["val"].shape[-2:]
    if constant.numel() != 1:
        return None
    diagonal = node.args[1] if len(node.args) > 1 else 0
    compare = operator.le if target is aten.tril.default else operator.ge
    kept = constant.flatten()[0]
    return Select(compare, torch.arange(keys), torch.arange(rows) + diagonal, kept, torch.zeros_like(kept))


def _map(node: Node, target, known: dict[Node, Known], operands: list[Known]) -> Select | None:
    """The operator applied to both answers of the one Select among its operands; all others are the same everywhere."""
    selects = [said for said in operands if isinstance(said, Select)]
    others = [said for said in operands if isinstance(said, Tensor)]
    if len(selects) != 1 or any(said.numel() != 1 for said in others) or node.meta["val"].dim() < 2:
        return None
    if target in PASS:
        size = (len(selects[0].rows), len(selects[0].keys))
        return selects[0] if tuple(node.meta["val"].shape[-2:]) == size else None
    if not _pointwise(target):
        return None

    def branch(answer: str) -> Tensor:
        value = lambda n: getattr(known[n], answer) if isinstance(known[n], Select) else known[n].flatten()[0]  # noqa: E731
        return target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    return replace(selects[0], yes=branch("yes"), no=branch("no"))
